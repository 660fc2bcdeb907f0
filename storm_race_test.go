//go:build race

package smtprelay_test

// stormDefault is how many seeds take some seconds; under the race detector each takes several times as long.
const stormDefault = 600
