//go:build !race

package test

// fewer is how many of n messages or callers a test uses if the number does not matter: all of them.
func fewer(n int) int { return n }

// largeBody is the size of the body that must pass in constant memory.
const largeBody = 1 << 30
