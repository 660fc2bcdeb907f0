// Package backoff computes how long to wait after failures.
package backoff

import (
	"math/rand/v2"
	"time"
)

// Doubled returns the pause after consecutive failures: least after the first, twice as long after each further one, most at most.
func Doubled(least, most time.Duration, failures int) time.Duration {
	if shift := failures - 1; least < most>>min(shift, 63) { // shifting least to the left would overflow
		return least << shift
	}
	return most
}

// Jittered returns a random time of up to Doubled (full jitter), so that clients that fail together do not retry together.
func Jittered(least, most time.Duration, failures int) time.Duration {
	return rand.N(Doubled(least, most, failures)) + 1
}
