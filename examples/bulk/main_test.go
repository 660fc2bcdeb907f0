package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/test/readback"
	"github.com/smtprelay/smtprelay/smtptest"
)

func start(t *testing.T, set func(*smtptest.Server)) (job, *smtptest.Server) {
	t.Helper()
	relay := smtptest.NewUnstartedServer()
	set(relay)
	relay.Start()
	t.Cleanup(relay.Close)
	client, err := smtprelay.New(relay.Config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return job{client: client, from: "news@example.com", subject: "News", text: []byte("There is news.\r\n"), unsubscribe: "https://example.com/unsubscribe"}, relay
}

func addresses(n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("reader%d@example.org", i)
	}
	return list
}

func TestEveryAddressIsAccountedFor(t *testing.T) {
	job, relay := start(t, func(s *smtptest.Server) {
		s.Reject = map[string]string{"reader3@example.org": "550 5.1.1 no such user", "reader4@example.org": "452 4.2.2 mailbox full"}
	})
	relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Rcpt: "reader5@example.org", Drop: true})
	var out, printed bytes.Buffer
	steps := 0
	r, err := job.send(t.Context(), addresses(200), &out, func() { steps++ })
	if err != nil {
		t.Fatal(err)
	}
	if steps != 200 {
		t.Errorf("%d steps of the bar, want 200", steps)
	}
	// A connection lost while one message waits for its final reply may take a neighbour with it, never more.
	if r.accepted != relay.Stats().Accepted || len(r.again) != 1 || len(r.refused) != 1 || len(r.unknown) < 1 || len(r.untried) != 0 {
		t.Errorf("accepted %d, not accepted for now %d, refused %d, unknown %d, not tried %d; the relay has %d",
			r.accepted, len(r.again), len(r.refused), len(r.unknown), len(r.untried), relay.Stats().Accepted)
	}
	if r.err() == nil {
		t.Error("mails are missing, but the exit status is 0")
	}
	again, never, found := strings.Cut(described(&r), "Refused;")
	if !found || !strings.Contains(again, "safe to send again:\n  reader4@example.org: ") || strings.Contains(again, "reader3") || strings.Contains(never, "safe to send again") {
		t.Errorf("the list that is safe to send again:\n%s", described(&r))
	}
	rows, err := csv.NewReader(&out).ReadAll()
	if err != nil || len(rows) != 200 {
		t.Errorf("%d rows, want 200; %v", len(rows), err)
	}
	r.print(&printed)
	for _, words := range []string{"200 addresses", "reader3@example.org: smtprelay: RCPT TO <reader3@example.org>: 550", "reader5@example.org: "} {
		if !strings.Contains(printed.String(), words) {
			t.Errorf("the report does not contain %q:\n%s", words, &printed)
		}
	}
}

func described(r *report) string {
	var b bytes.Buffer
	r.print(&b)
	return b.String()
}

func TestAllAcceptedIsSuccess(t *testing.T) {
	job, relay := start(t, func(*smtptest.Server) {})
	job.subject = "März"
	for range 2 {
		r, err := job.send(t.Context(), addresses(1), io.Discard, func() {})
		if err != nil || r.err() != nil {
			t.Fatal(err, r.err())
		}
	}
	mails := relay.Messages()
	first := readback.Message(t, mails[0], "news@example.com", "reader0@example.org")
	second := readback.Message(t, mails[1], "news@example.com", "reader0@example.org")
	if id := first.Header.Get("Message-Id"); !strings.HasSuffix(id, "@example.com>") || id != second.Header.Get("Message-Id") {
		t.Errorf("Message-ID %q, and %q in the second run", id, second.Header.Get("Message-Id"))
	}
	if first.Subject != "März" || first.Header.Get("List-Unsubscribe") != "<https://example.com/unsubscribe?address=reader0%40example.org>" {
		t.Errorf("header: %q", first.Header)
	}
}

func TestProgramFailsUnlessEveryMailWasAccepted(t *testing.T) {
	relay := smtptest.New(t, func(s *smtptest.Server) { s.Reject = map[string]string{"gone@example.org": "550 5.1.1 no such user"} })
	for list, says := range map[string]string{
		"ann@example.org\n": "",
		"# readers\nann@example.org\ngone@example.org\n": "1 of 2 mails were accepted",
	} {
		file := filepath.Join(t.TempDir(), "list")
		if err := os.WriteFile(file, []byte(list), 0o600); err != nil {
			t.Fatal(err)
		}
		err := run(t.Context(), relay.URL(), "news@example.com", file, "News", "", "https://example.com/unsubscribe", "")
		if got := fmt.Sprint(err); err == nil && says != "" || err != nil && got != says {
			t.Errorf("%q: got %v, want %q", list, err, says)
		}
	}
}

func TestInterruptFinishesMailsInProgressAndReportsTheRest(t *testing.T) {
	job, relay := start(t, func(*smtptest.Server) {})
	ctx, interrupt := context.WithCancel(t.Context())
	var out, printed bytes.Buffer
	done := 0
	r, err := job.send(ctx, addresses(1000), &out, func() {
		if done++; done == 100 {
			interrupt()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.accepted != relay.Stats().Accepted || r.accepted < 100 || r.accepted+len(r.untried) != 1000 || len(r.untried) == 0 {
		t.Errorf("accepted %d and not tried %d of 1,000; the relay has %d", r.accepted, len(r.untried), relay.Stats().Accepted)
	}
	if len(r.again)+len(r.refused)+len(r.unknown) != 0 {
		t.Errorf("not accepted %d, unknown %d: mails in progress were not finished", len(r.again)+len(r.refused), len(r.unknown))
	}
	if r.err() == nil {
		t.Error("mails are missing, but the exit status is 0")
	}
	rows, err := csv.NewReader(&out).ReadAll()
	if err != nil || len(rows) != 1000 {
		t.Errorf("%d rows, want 1,000; %v", len(rows), err)
	}
	r.print(&printed)
	if !strings.Contains(printed.String(), "Interrupted") || !strings.Contains(printed.String(), "Not tried:") {
		t.Errorf("the report:\n%s", &printed)
	}
}
