//go:build !linux

package sockets

import "net"

// tcpState cannot be told here: no connection is then counted as one too many.
func tcpState(*net.TCPConn) connState { return over }
