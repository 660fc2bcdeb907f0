//go:build race

package sockets

// raceDetector excludes chunks to go-smtp's server from the storm: the server has a data race (v0.25.1, Conn.dataResult) if
// another message follows an abandoned message in chunks.
const raceDetector = true
