//go:build !unix

package smtptest

import "syscall"

// peek cannot tell here whether a socket has input.
func peek(syscall.RawConn) int { return 0 }
