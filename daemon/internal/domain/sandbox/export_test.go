package sandbox

// CleanupLimit is for tests of the package from outside, which can use the fakes of sandboxtest.
const CleanupLimit = cleanupLimit
