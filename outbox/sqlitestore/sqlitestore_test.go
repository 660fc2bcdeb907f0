// Here belongs what a folder is to be seen doing: the tests of every store, fsyncs, bodies beside the database.
package sqlitestore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/storetest"
)

func TestStore(t *testing.T) {
	storetest.Run(t, storetest.One, func(t *testing.T, dir string) outbox.Store {
		s, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func TestOpenExistingOpensWhatIsThereAndCreatesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "outbox")
	if _, err := OpenExisting(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a store: %v, want ErrNotExist", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder: %v, want none", err)
	}
	for _, open := range []func(string) (*Store, error){Open, OpenExisting} {
		s, err := open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, err := s.Count(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestDatabaseOfAnotherLayoutIsRefused(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.write.Exec(`PRAGMA user_version = 1`); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err := Open(dir); err == nil || !strings.Contains(err.Error(), "layout 1") {
		t.Errorf("%v, %v, want an error that tells the layout", s, err)
	}
}

// put enqueues messages by these IDs, of a tenant.
func put(t *testing.T, s *Store, tenant string, ids ...string) {
	t.Helper()
	for _, id := range ids {
		e := outbox.Entry{Item: outbox.Item{ID: id, Tenant: tenant, Due: time.Now()}, Body: smtprelay.Bytes([]byte(id))}
		if err := s.Put(t.Context(), []outbox.Entry{e})[0]; err != nil {
			t.Fatal(err)
		}
	}
}

func claim(t *testing.T, s *Store, n int) []outbox.Claim {
	t.Helper()
	claims, _, err := s.Claim(t.Context(), time.Now(), n, func(string) int { return 1 })
	if err != nil {
		t.Fatal(err)
	}
	return claims
}

func finish(t *testing.T, s *Store, c outbox.Claim, state outbox.State) error {
	c.State, c.Changed = state, time.Now()
	return s.End(t.Context(), []outbox.End{{Nonce: c.Nonce, Item: c.Item}})[0]
}

func TestBodiesOfAcceptedMessagesAreRemovedManyAtOnce(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range many + 2 {
		put(t, s, "", fmt.Sprint(i))
	}
	left := func(want int) {
		t.Helper()
		var n int
		if err := s.read.QueryRow(`SELECT count(*) FROM body`).Scan(&n); err != nil || n != want {
			t.Errorf("%d bodies, %v; want %d", n, err, want)
		}
	}
	claims := claim(t, s, many+2)
	if err := finish(t, s, claims[many+1], outbox.Dead); err != nil {
		t.Fatal(err)
	}
	for i, c := range claims[:many+1] {
		if i == many-1 {
			left(many + 2)
		}
		if err := finish(t, s, c, outbox.Accepted); err != nil {
			t.Fatal(err)
		}
	}
	left(2)
	if n, err := s.Forget(t.Context(), time.Now().Add(time.Hour)); err != nil || n != many+1 {
		t.Errorf("forgot %d, %v; want %d", n, err, many+1)
	}
	left(1) // that of the dead one
}

// SQLite gives the number of a row that was deleted to another one.
func TestEndOfAForgottenMessageLeavesOthersAlone(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	put(t, s, "", "forgotten")
	c := claim(t, s, 1)[0]
	if err := s.Change(t.Context(), c.ID, func(i *outbox.Item) error { i.State = outbox.Cancelled; return nil }); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Forget(t.Context(), time.Now().Add(time.Hour)); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	put(t, s, "", "another")
	if err := finish(t, s, c, outbox.Accepted); !errors.Is(err, outbox.ErrConflict) {
		t.Errorf("the end of the forgotten one: %v, want ErrConflict", err)
	}
	if i, err := s.Get(t.Context(), "another"); err != nil || i.State != outbox.Queued {
		t.Errorf("the other one is %v, %v; want queued", i.State, err)
	}
}

// To sort all that are queued for each page takes minutes where they are many.
func TestQueuedMessagesAreListedInOrderAndNotSorted(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var want, got []string
	for i := range 2*page + 50 {
		id := fmt.Sprint(i)
		e := outbox.Entry{Item: outbox.Item{ID: id, Due: time.Now()}, Body: smtprelay.Bytes(nil)}
		if i%3 == 0 || i > 2*page {
			e.Due = e.Due.Add(time.Hour)
		}
		if err := s.Put(t.Context(), []outbox.Entry{e})[0]; err != nil {
			t.Fatal(err)
		}
		want = append(want, id)
	}
	for i, err := range s.List(t.Context(), outbox.Queued) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, i.ID)
	}
	if !slices.Equal(got, want) {
		t.Errorf("listed %v, want %v", got, want)
	}
	rows, err := s.read.Query(`EXPLAIN QUERY PLAN `+listed(outbox.Queued), 0, page)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var id, parent, unused int
		var step string
		if err := rows.Scan(&id, &parent, &unused, &step); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(step, "TEMP B-TREE") || strings.HasPrefix(step, "SCAN") {
			t.Errorf("the plan has the step %q", step)
		}
	}
}

func TestTenantInHandKeepsNothingFromTheOthers(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	put(t, s, "b", "in hand")
	claim(t, s, 1)
	for i := range 10 {
		put(t, s, "a", fmt.Sprint("a", i))
		put(t, s, "c", fmt.Sprint("c", i))
	}
	if got := claim(t, s, 20); len(got) != 20 {
		t.Errorf("claimed %d, want 20", len(got))
	}
}
