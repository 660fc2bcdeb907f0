//go:build race

package test

// fewer is how many of n messages a test sends, or callers it has, where the number does not matter: under the race detector each
// costs several times as much.
func fewer(n int) int { return n / 5 }
