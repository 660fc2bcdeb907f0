package outbox_test

// Here belongs what an Outbox does whatever its store is.

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
)

// busy is a store with one message, which it takes a minute for not to write down the end of.
type busy struct {
	outbox.Store
	claimed, released bool
}

func (s *busy) Attach(context.Context) (func() error, int, error) {
	return func() error { return nil }, 0, nil
}
func (s *busy) Forget(context.Context, time.Time) (int, error) { return 0, nil }
func (s *busy) Release(...string)                              { s.released = true }

func (s *busy) Claim(_ context.Context, now time.Time, _ int, _ func(string) int) ([]outbox.Claim, time.Time, error) {
	if s.claimed {
		return nil, time.Time{}, nil
	}
	s.claimed = true
	return []outbox.Claim{{Item: outbox.Item{ID: "late", NotAfter: now.Add(-time.Second)}}}, time.Time{}, nil
}

func (s *busy) End(context.Context, []outbox.End) []error {
	time.Sleep(time.Minute)
	return []error{errors.New("the database is locked")}
}

// slow is a store that needs a minute to start.
type slow struct{ outbox.Store }

func (slow) Attach(ctx context.Context) (func() error, int, error) {
	select {
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	case <-time.After(time.Minute):
		return nil, 0, errors.New("no such folder")
	}
}

func TestRunThatIsStoppedWhileTheStoreStartsReturnsNoError(t *testing.T) {
	for name, tt := range map[string]struct {
		stop   time.Duration
		failed bool
	}{"stopped": {time.Second, false}, "failed": {time.Hour, true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				box, err := outbox.New(outbox.Config{Store: slow{}, Route: func(outbox.Item) *smtprelay.Client { return nil }})
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), tt.stop)
				defer cancel()
				if err := box.Run(ctx); (err != nil) != tt.failed {
					t.Errorf("%v; an error: want %t", err, tt.failed)
				}
			})
		})
	}
}

func TestRunDoesNotWaitAgainAndAgainForAStoreThatIsSlowToFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &busy{}
		box, err := outbox.New(outbox.Config{Store: store, Route: func(outbox.Item) *smtprelay.Client { return nil }})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if err := box.Run(ctx); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 2*time.Minute || !store.released {
			t.Errorf("it returned after %v, the claim released: %t; want a minute or two, true", took, store.released)
		}
	})
}
