//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package fileslots

import (
	"os"
	"syscall"
)

// lock locks file, until it is closed, and reports false if somebody else has it locked.
func lock(file *os.File) (bool, error) {
	for {
		switch err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err {
		case nil:
			return true, nil
		case syscall.EINTR:
		case syscall.EWOULDBLOCK:
			return false, nil
		default:
			return false, &os.PathError{Op: "flock", Path: file.Name(), Err: err}
		}
	}
}
