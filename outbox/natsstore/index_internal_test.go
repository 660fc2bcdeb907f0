// Here belongs what a worker makes of the records that it reads.
package natsstore

import (
	"testing"
	"time"

	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/natsstore/embedded"
)

func TestIDOfAMessageThatWasForgottenIsThatOfANewOne(t *testing.T) {
	x := newIndex()
	x.share(func(uint64) bool { return true }, true)
	x.record(mailToken+"x", 1, meta{ID: "x", State: outbox.Queued}, true)
	x.record(stateToken+"x", 2, meta{ID: "x", State: outbox.Sending}, true)
	// Its end was removed before it came so far.
	x.record(mailToken+"x", 5, meta{ID: "x", State: outbox.Queued}, true)
	x.advance(time.Now())
	taken := x.take(2, func(string) int { return 1 }, func() string { return "nonce" })
	if len(taken) != 1 || taken[0].mail != 5 || taken[0].state != 5 || len(x.sending) != 0 {
		t.Errorf("claimed %+v; %d are being sent", taken, len(x.sending))
	}
	x.record(mailToken+"x", 6, meta{ID: "x", State: outbox.Accepted}, true)
	if len(x.entries) != 0 {
		t.Errorf("%d are left when it is over", len(x.entries))
	}
}

func TestReadAsksTheLeaderForWhatAServerDoesNotHave(t *testing.T) {
	server, err := embedded.Start(embedded.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	nc, err := server.Connect()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	s, err := New(nc, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	seq, err := s.log.Write(t.Context(), "mail.x", 0, nil, []byte("text"))
	if err != nil {
		t.Fatal(err)
	}
	// The second stands for a server that is behind: it has an earlier one than that which was seen.
	got, err := s.read(t.Context(), []record{{"mail.x", seq}, {"mail.x", seq + 1}, {"mail.y", 1}})
	if err != nil || len(got) != 3 || got[2] != nil {
		t.Fatalf("got %v, %v", got, err)
	}
	for _, m := range got[:2] {
		if m == nil || m.Seq != seq || string(m.Data) != "text" {
			t.Errorf("got %+v", m)
		}
	}
}
