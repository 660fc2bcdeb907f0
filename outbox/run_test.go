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
