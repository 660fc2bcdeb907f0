// The failures that each call site must handle, and the length of the call sites.
package callsites

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// The web handler.

func TestWebHandlerAnswersByTheOutcomeOfTheMail(t *testing.T) {
	for _, tt := range []struct {
		why   string
		email string
		fault *smtptest.Fault
		want  int
	}{
		{"sent", "ann@example.org", nil, http.StatusOK},
		{"no such user", "ann@example.org", &smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"}, http.StatusUnprocessableEntity},
		{"no address", "ann", nil, http.StatusUnprocessableEntity},
		{"greylisted", "ann@example.org", &smtptest.Fault{At: smtptest.Rcpt, Reply: "451 4.7.1 later"}, http.StatusServiceUnavailable},
		{"wrong key", "ann@example.org", &smtptest.Fault{At: smtptest.Auth, Reply: "535 5.7.8 no"}, http.StatusServiceUnavailable},
		{"lost after the final dot", "ann@example.org", &smtptest.Fault{At: smtptest.Accepted, Drop: true}, http.StatusAccepted},
		{"spam", "ann@example.org", &smtptest.Fault{At: smtptest.FinalDot, Reply: "554 5.7.1 no"}, http.StatusInternalServerError},
	} {
		t.Run(tt.why, func(t *testing.T) {
			relay := smtptest.New(t)
			if tt.fault != nil {
				relay.Fault(*tt.fault)
			}
			w := httptest.NewRecorder()
			(&reset{relay.Client(t)}).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "POST", "/?email="+tt.email, nil))
			if w.Code != tt.want {
				t.Errorf("got %d, want %d", w.Code, tt.want)
			}
		})
	}
}

func TestWebHandlerAsksForARetryDuringADeploy(t *testing.T) {
	relay := smtptest.New(t)
	client := relay.Client(t)
	if err := client.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	(&reset{client}).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "POST", "/?email=ann@example.org", nil))
	if w.Code != http.StatusServiceUnavailable {
		t.Errorf("got %d, want 503", w.Code)
	}
}

// The batch.

// table is a database with one table, enough for batch.
type table struct {
	mu     sync.Mutex // guards the field below
	states map[int64]string
}

func newTable(n int) *table {
	d := &table{states: map[int64]string{}}
	for id := range int64(n) {
		d.states[id] = "new"
	}
	return d
}

// count returns how many rows are in each state.
func (d *table) count() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := map[string]int{}
	for _, state := range d.states {
		n[state]++
	}
	return n
}

func (d *table) Connect(context.Context) (driver.Conn, error) { return tableConn{d}, nil }
func (d *table) Driver() driver.Driver                        { return nil }

type tableConn struct{ *table }

func (c tableConn) Begin() (driver.Tx, error)           { return nil, errors.ErrUnsupported }
func (c tableConn) Close() error                        { return nil }
func (c tableConn) Prepare(string) (driver.Stmt, error) { return tableStmt(c), nil }

type tableStmt struct{ *table }

func (s tableStmt) Close() error  { return nil }
func (s tableStmt) NumInput() int { return -1 }

func (s tableStmt) Query([]driver.Value) (driver.Rows, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []int64
	for _, id := range slices.Sorted(maps.Keys(s.states)) {
		if s.states[id] == "new" {
			ids = append(ids, id)
		}
	}
	return &tableRows{ids}, nil
}

func (s tableStmt) Exec(args []driver.Value) (driver.Result, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states[args[1].(int64)] = args[0].(string)
	return driver.RowsAffected(1), nil
}

type tableRows struct{ ids []int64 }

func (r *tableRows) Columns() []string { return []string{"id", "email"} }
func (r *tableRows) Close() error      { return nil }

func (r *tableRows) Next(row []driver.Value) error {
	if len(r.ids) == 0 {
		return io.EOF
	}
	row[0], row[1] = r.ids[0], fmt.Sprintf("reader%d@example.org", r.ids[0])
	r.ids = r.ids[1:]
	return nil
}

func TestBatchWritesEachResultToItsRow(t *testing.T) {
	relay := smtptest.New(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "reader7@example.org", Reply: "550 5.1.1 no such user"})
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "reader8@example.org", Reply: "450 4.2.2 mailbox full"})
	d := newTable(50)
	if err := batch(t.Context(), sql.OpenDB(d), relay.Client(t)); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(d.count()); got != "map[accepted:48 new:1 not accepted:1]" || d.states[7] != "not accepted" || d.states[8] != "new" {
		t.Errorf("got %s, %s for reader 7 and %s for reader 8", got, d.states[7], d.states[8])
	}
}

func TestInterruptedBatchLeavesNothingUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := smtptest.New(t, func(s *smtptest.Server) { s.InMemory = true })
		relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: time.Second, Count: -1})
		d := newTable(200)
		ctx, interrupt := context.WithCancel(t.Context())
		go func() { // ends by itself
			time.Sleep(3500 * time.Millisecond)
			interrupt()
		}()
		db := sql.OpenDB(d)
		defer db.Close()
		if err := batch(ctx, db, relay.Client(t)); err != nil {
			t.Fatal(err)
		}
		got := d.count()
		if accepted := relay.Stats().Accepted; got["unknown"] != 0 || accepted == 0 || got["accepted"] != accepted || got["new"] != 200-accepted {
			t.Errorf("got %v, but the relay has %d", got, accepted)
		}
		// The next run sends the rest, and nothing twice.
		if err := batch(t.Context(), db, relay.Client(t)); err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, m := range relay.Messages() {
			seen[m.To[0]] = true
		}
		if got := d.count(); got["accepted"] != 200 || len(seen) != 200 || relay.Stats().Accepted != 200 {
			t.Errorf("got %v, %d messages at the relay for %d people", got, relay.Stats().Accepted, len(seen))
		}
	})
}

// The queue's worker.

// fakeStore records what a worker does with jobs.
type fakeStore struct {
	parked   int
	requeued []string
}

func (f *fakeStore) park(int64, error) error { f.parked++; return nil }

func (f *fakeStore) requeue(_ int64, to []string) error {
	f.requeued = append(f.requeued, to...)
	return nil
}

func mailTo(to ...string) *job {
	return &job{ID: 1, From: "shop@example.com", To: to, Text: message(to[0])}
}

// kept reports whether the queue retries the job.
func kept(err error) bool {
	_, over := errors.AsType[cancelled](err)
	return err != nil && !over
}

// A test of a failure: the relay accepts the message, and the connection is lost before the reply.
func TestUnknownIsParked(t *testing.T) {
	relay := smtptest.New(t)
	fault := relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true})
	db := &fakeStore{}
	if err := (&worker{relay.Client(t), db}).Work(t.Context(), mailTo("b@example.org")); err != nil || db.parked != 1 || fault.Hits() != 1 {
		t.Fatal(err, db.parked)
	}
}

func TestWorkerRequeuesRecipientsThatMayBeRetried(t *testing.T) {
	relay := smtptest.New(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "gone@example.org", Reply: "550 5.1.1 no such user", Count: -1})
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "full@example.org", Reply: "450 4.2.2 mailbox full", Count: -1})
	db := &fakeStore{}
	w := &worker{relay.Client(t), db}
	if err := w.Work(t.Context(), mailTo("ann@example.org", "gone@example.org", "full@example.org")); err != nil {
		t.Error(err)
	}
	if got := strings.Join(db.requeued, " "); got != "full@example.org" {
		t.Errorf("requeued: %s", got)
	}
	if m := relay.Messages(); len(m) != 1 || len(m[0].To) != 1 {
		t.Errorf("the relay has %d messages", len(m))
	}
}

func TestWorkerGivesUpIfThereIsNoSuchUser(t *testing.T) {
	relay := smtptest.New(t)
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"})
	if err := (&worker{relay.Client(t), &fakeStore{}}).Work(t.Context(), mailTo("gone@example.org")); err == nil || kept(err) {
		t.Errorf("got %v, want the job cancelled", err)
	}
}

func TestWorkerKeepsAllJobsIfTheKeyIsWrong(t *testing.T) {
	relay := smtptest.New(t)
	client := relay.Client(t, func(cfg *smtprelay.Config) { cfg.Password = "yesterday's key" })
	allKept(t, &worker{client, &fakeStore{}}, 50)
}

func TestWorkerKeepsAllJobsDuringADeploy(t *testing.T) {
	client := smtptest.New(t).Client(t)
	if err := client.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	allKept(t, &worker{client, &fakeStore{}}, 50)
}

// allKept runs n jobs that fail, and checks that the queue keeps each.
func allKept(t *testing.T, w *worker, n int) {
	t.Helper()
	results := make(chan error)
	for range n {
		go func() { results <- w.Work(t.Context(), mailTo("ann@example.org")) }() // ends with its Send
	}
	for range n {
		if err := <-results; !kept(err) {
			t.Errorf("got %v, want the job kept", err)
		}
	}
}

// The tenants.

func TestTenantWithAWrongKeyDoesNotAffectTheOthers(t *testing.T) {
	relay := smtptest.New(t, func(s *smtptest.Server) { s.NoTLS = true })
	good := relay.URL()
	urls := map[string]string{"shop": good, "bank": strings.Replace(good, relay.Password, "stolen", 1)}
	all := &tenants{urls: func(tenant string) (string, error) { return urls[tenant], nil }}
	defer all.mail.Shutdown(context.Background())
	for range 3 {
		for _, tenant := range []string{"shop", "bank"} {
			err := all.Send(t.Context(), tenant, smtprelay.Message{
				From: "shop@example.com", To: []string{"ann@example.org"}, Body: smtprelay.Bytes(message("ann@example.org")),
			})
			if (tenant == "shop") != (err == nil) || err != nil && !smtprelay.ShouldRetry(err) {
				t.Errorf("%s: %v", tenant, err)
			}
		}
	}
	if n := len(relay.Messages()); n != 3 {
		t.Errorf("%d messages, want 3", n)
	}
}

// Counts the lines of a call site without blank lines and comments: what a reader has to understand.
func TestCallSitesAreShort(t *testing.T) {
	for _, tt := range []struct {
		site, file string
		begins     []string
		most       int
	}{
		{"web handler", "web.go", []string{"type reset ", "func (h *reset)"}, 21},
		{"batch", "batch.go", []string{"func batch("}, 31},
		{"queue worker", "worker.go", []string{"type worker ", "func (w *worker)"}, 18},
		{"tenants", "tenants.go", []string{"type tenants ", "func (t *tenants)"}, 16},
		{"test of a failure", "callsites_test.go", []string{"func TestUnknownIsParked("}, 8},
	} {
		text, err := os.ReadFile(tt.file)
		if err != nil {
			t.Fatal(err)
		}
		lines, in := 0, false
		for line := range strings.Lines(string(text)) {
			begins := func(words string) bool { return strings.HasPrefix(line, words) }
			in = in || slices.ContainsFunc(tt.begins, begins)
			if code := strings.TrimSpace(line); in && code != "" && !strings.HasPrefix(code, "//") {
				lines++
			}
			if strings.HasSuffix(line, "}\n") && !strings.HasPrefix(line, "\t") {
				in = false
			}
		}
		t.Logf("%s: %d lines", tt.site, lines)
		if lines == 0 || lines > tt.most {
			t.Errorf("%s: %d lines, want at most %d", tt.site, lines, tt.most)
		}
	}
}
