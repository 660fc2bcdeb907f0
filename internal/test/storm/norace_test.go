//go:build !race

package storm

// stormDefault is how many seeds take some seconds.
const stormDefault = 3000
