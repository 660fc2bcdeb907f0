// Package sockets holds the tests of the client on real TCP connections: what only a real network shows, such as a RST that
// the other side never reads, a FIN in the middle of a write, octets that are still in a socket's buffer. They use the public
// API alone. Each compares what a relay has accepted with what the client has told its callers; nothing is timed.
//
//	go test ./internal/test/sockets -v -sockets.sends=1000000 -timeout 2h
//
// TestStorm draws everything from the seed that it prints. The order in which goroutines and sockets run is not drawn, so
// one seed does not repeat a run exactly; -sockets.round repeats one round of it as often as -count says.
package sockets
