//go:build !linux

package conn

import "time"

// SetUnacked does nothing: there is no such option here, or none that package syscall can set.
func SetUnacked(fd uintptr, d time.Duration) error { return nil }

func acknowledge(fd uintptr) {}

const acknowledges = false
