package conn

import (
	"context"
	"fmt"
)

// ContextError returns ctx.Err(), wrapped together with the context's cause if the two differ; nil if ctx has not ended.
func ContextError(ctx context.Context) error {
	err := ctx.Err()
	if cause := context.Cause(ctx); err != nil && cause != err { // ctx may end between the two calls
		return fmt.Errorf("%w: %w", err, cause)
	}
	return err
}
