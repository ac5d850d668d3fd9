package sandbox

// CleanupTimeout is exported for the external tests, which, unlike tests in this package, can import sandboxtest.
const CleanupTimeout = cleanupTimeout
