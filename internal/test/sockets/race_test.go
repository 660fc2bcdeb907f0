//go:build race

package sockets

// raceDetector leaves go-smtp's server in chunks out of the storm: it has a data race of its own (v0.25.1, Conn.dataResult),
// where a message in chunks that was given up is followed by another one.
const raceDetector = true
