//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package fileslots

import (
	"errors"
	"os"
)

func lock(*os.File) (bool, error) { return false, errors.ErrUnsupported }
