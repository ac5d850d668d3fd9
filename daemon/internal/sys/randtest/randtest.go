// Package randtest provides random numbers for tests that can be repeated. Only tests import it.
package randtest

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// Seed returns the seed for a test's random choices: MSB_SEED, a decimal number, if it is set, otherwise a random
// one. It logs the seed, which Go prints when the test fails.
func Seed(t testing.TB) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("MSB_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("MSB_SEED must be a decimal number of up to 64 bits: %v", err)
		}
	}
	t.Logf("random seed: %d (set MSB_SEED to repeat the same choices)", seed)
	return seed
}

// New returns a generator with the seed of Seed. Like every rand.Rand, it is for one goroutine at a time.
func New(t testing.TB) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewPCG(Seed(t), 0))
}
