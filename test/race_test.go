//go:build race

package test

// fewer is how many of n messages or callers a test uses if the number does not matter: the race detector makes each several
// times as expensive.
func fewer(n int) int { return n / 5 }

// largeBody is the size of the body that must pass in constant memory. The race detector examines each octet of it.
const largeBody = 128 << 20
