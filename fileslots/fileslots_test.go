// Here belongs how places are shared out, by several Slots of one directory in one process. What needs processes that die is in
// processes_test.go.
package fileslots

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
)

// member is a process that wants as many places as it can get, and gives back those that are wanted at once.
type member struct {
	*Slots
	cancel context.CancelFunc
	all    sync.WaitGroup

	mu      sync.Mutex
	has     int
	first   time.Time // when it got its first place
	seconds float64   // of places, added up
}

func join(t *testing.T, dir string, n int) *member {
	t.Helper()
	s, err := New(dir, n, -1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	m := &member{Slots: s, cancel: cancel}
	m.all.Go(func() {
		for {
			slot, err := s.Acquire(ctx)
			if err != nil {
				return
			}
			began := time.Now()
			m.mu.Lock()
			m.has++
			if m.first.IsZero() {
				m.first = began
			}
			m.mu.Unlock()
			m.all.Go(func() {
				select {
				case <-slot.Retire:
					time.Sleep(50 * time.Millisecond) // for the message under way, and QUIT
				case <-ctx.Done():
				}
				m.mu.Lock()
				m.has--
				m.seconds += time.Since(began).Seconds()
				m.mu.Unlock()
				slot.Release(true)
			})
		}
	})
	return m
}

// leave ends the member and returns how long it has had places, in seconds, all added up.
func (m *member) leave() float64 {
	m.cancel()
	m.all.Wait()
	return m.seconds
}

func (m *member) holds() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.has
}

func TestOneProcessHasAllPlacesAndANewcomerHasItsFirstWithinTwoSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		one := join(t, dir, 10)
		time.Sleep(5 * time.Second)
		if one.holds() != 10 {
			t.Errorf("the only one has %d places, want 10", one.holds())
		}
		came := time.Now()
		two := join(t, dir, 10)
		time.Sleep(5 * time.Second)
		if wait := two.first.Sub(came); two.first.IsZero() || wait > 2*time.Second {
			t.Errorf("the newcomer had its first place after %v", wait)
		}
		if one.holds() != 5 || two.holds() != 5 {
			t.Errorf("they have %d and %d places, want 5 each", one.holds(), two.holds())
		}
		one.leave()
		time.Sleep(5 * time.Second)
		if two.holds() != 10 {
			t.Errorf("the one that is left has %d places, want 10", two.holds())
		}
		two.leave()
		time.Sleep(time.Second)
	})
}

func TestPlacesThatDoNotDivideEvenlyGoRound(t *testing.T) {
	for _, test := range []struct{ places, members int }{{10, 8}, {2, 5}} {
		synctest.Test(t, func(t *testing.T) {
			dir := t.TempDir()
			var members []*member
			for range test.members {
				members = append(members, join(t, dir, test.places))
			}
			time.Sleep(30 * time.Second)
			least, most := -1.0, 0.0
			for _, m := range members {
				had := m.leave()
				most = max(most, had)
				if least < 0 || had < least {
					least = had
				}
			}
			if least < 0.5*most {
				t.Errorf("%d places, %d members: one had places for %.1f seconds and another for %.1f", test.places, test.members, least, most)
			}
			time.Sleep(time.Second)
		})
	}
}

func TestPlaceThatWasNotGivenBackInOrderIsHeldBackForGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		s, err := New(dir, 1, 3*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		acquire := func(want time.Duration) smtprelay.Slot {
			t.Helper()
			began := time.Now()
			slot, err := s.Acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got := time.Since(began); got != want {
				t.Errorf("the place came after %v, want %v", got, want)
			}
			return slot
		}
		acquire(0).Release(true)
		acquire(0).Release(false)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Acquire(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the end of the context", err)
		}
		acquire(3 * time.Second).Release(true) // it was given up while it was held back
		acquire(0).Release(true)
		time.Sleep(time.Second)
	})
}

func TestProcessThatHasStoppedToLookKeepsNobodyWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		stopped, err := New(dir, 1, -1)
		if err != nil {
			t.Fatal(err)
		}
		stopped.waiters, stopped.since = 1, time.Now()
		if err := stopped.locked(t.Context(), func(*table) error { return nil }); err != nil {
			t.Fatal(err)
		}
		m := join(t, dir, 1)
		time.Sleep(2 * time.Second)
		if m.holds() != 1 {
			t.Error("it waits for one that is not there")
		}
		m.leave()
		time.Sleep(time.Second)
	})
}

func TestTableThatIsCutShortIsMadeAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		one, two := join(t, dir, 4), join(t, dir, 4)
		time.Sleep(time.Second)
		if err := os.WriteFile(filepath.Join(dir, "table"), []byte(`{"Processes":{"x":`), 0o666); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if one.holds() != 2 || two.holds() != 2 {
			t.Errorf("they have %d and %d places, want 2 each", one.holds(), two.holds())
		}
		one.leave()
		two.leave()
		time.Sleep(time.Second)
	})
}

func TestMistakesAreTold(t *testing.T) {
	if _, err := New(t.TempDir(), 0, 0); err == nil {
		t.Error("no places are no error")
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(file, 1, 0); err == nil {
		t.Error("a file in place of a directory is no error")
	}
}
