//go:build !race

package smtprelay_test

// largeBody is the size of the body that must pass in constant memory.
const largeBody = 1 << 30
