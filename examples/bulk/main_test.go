package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"fmt"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
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
	return job{client: client, from: "news@example.com", subject: "News", text: []byte("There is news.\r\n")}, relay
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
		s.Reject = map[string]string{"reader3@example.org": "550 5.1.1 no such user"}
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
	// A connection that is lost with one message behind its final dot may take a neighbour with it, never more than that.
	if r.accepted != relay.Stats().Accepted || len(r.notAccepted) != 1 || len(r.unknown) < 1 || len(r.untried) != 0 {
		t.Errorf("accepted %d, not accepted %d, unknown %d, not tried %d; the relay has %d",
			r.accepted, len(r.notAccepted), len(r.unknown), len(r.untried), relay.Stats().Accepted)
	}
	rows, err := csv.NewReader(&out).ReadAll()
	if err != nil || len(rows) != 200 {
		t.Errorf("%d rows, want 200; %v", len(rows), err)
	}
	r.print(&printed)
	for _, words := range []string{"200 addresses", "reader3@example.org: smtprelay: RCPT TO <reader3@example.org>: 550", "reader5@example.org: "} {
		if !strings.Contains(printed.String(), words) {
			t.Errorf("the report does not say %q:\n%s", words, &printed)
		}
	}
}

func TestInterruptFinishesWhatIsUnderWayAndTellsTheRest(t *testing.T) {
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
	if len(r.notAccepted)+len(r.unknown) != 0 {
		t.Errorf("not accepted %d, unknown %d: what was under way was not finished", len(r.notAccepted), len(r.unknown))
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
