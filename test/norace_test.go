//go:build !race

package test

// fewer is how many of n messages a test sends, or callers it has, where the number does not matter: all of them.
func fewer(n int) int { return n }
