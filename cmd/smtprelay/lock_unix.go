//go:build unix

package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// lock holds f against other processes until it is closed or the process ends.
func lock(f *os.File) error {
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
}
