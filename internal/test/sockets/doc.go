// Package sockets tests the client on real TCP connections: what only a real network shows, such as a RST that the other side
// never reads, a FIN in the middle of a write, octets that are still in a socket's buffer. The tests use only the public API.
// Each compares what a relay has accepted with what the client has reported to its callers; nothing is timed.
//
//	go test ./internal/test/sockets -v -sockets.sends=1000000 -timeout 2h
//
// TestStorm draws everything from the seed that it prints. The schedule of goroutines and sockets is not drawn, so one seed does
// not repeat a run exactly; -sockets.round repeats one round of it -count times.
package sockets
