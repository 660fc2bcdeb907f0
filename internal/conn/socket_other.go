//go:build !linux

package conn

import "time"

// SetUnacked does nothing: this system has no such option, or package syscall cannot set it.
func SetUnacked(fd uintptr, d time.Duration) error { return nil }

func acknowledge(fd uintptr) {}

const acknowledges = false
