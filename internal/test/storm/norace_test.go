//go:build !race

package storm

// stormDefault is how many seeds run in some seconds.
const stormDefault = 3000
