//go:build race

package storm

// stormDefault is how many seeds run in some seconds; under the race detector each takes several times as long.
const stormDefault = 600
