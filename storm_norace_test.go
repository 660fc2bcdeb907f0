//go:build !race

package smtprelay_test

// stormDefault is how many seeds take some seconds.
const stormDefault = 3000
