//go:build !unix

package smtptest

import "syscall"

// peek cannot detect input on this system.
func peek(syscall.RawConn) int { return 0 }
