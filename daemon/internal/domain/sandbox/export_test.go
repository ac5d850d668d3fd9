package sandbox

// These are exported for the external tests, which, unlike tests in this package, can import sandboxtest.
const (
	CleanupTimeout = cleanupTimeout
	MaxFailed      = maxFailed
	MaxAllFailed   = maxAllFailed
)
