package conn

import (
	"context"
	"fmt"
)

// ContextError is the error of a context that has ended, and its cause where that was given one of its own; nil if it has not.
func ContextError(ctx context.Context) error {
	err := ctx.Err()
	if cause := context.Cause(ctx); err != nil && cause != err { // it may end in between
		return fmt.Errorf("%w: %w", err, cause)
	}
	return err
}
