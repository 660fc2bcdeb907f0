package sockets

import (
	"bytes"
	"testing"

	"github.com/smtprelay/smtprelay"
)

// Tests of the judge: a judge that finds nothing would let every client pass.

func TestJudge(t *testing.T) {
	whole := func(m *message) []byte { return m.appendBody(nil) }
	one := &message{id: 1, to: []string{recipient("ok", 0, 1), recipient("ok", 1, 1)}, size: 5000}
	two := &message{id: 2, to: []string{recipient("ok", 0, 2)}, size: 5000}
	tiny := &message{id: 3, to: []string{recipient("ok", 0, 3)}, size: 1}
	all := []*message{one, two, tiny}
	failed := func(m *message, o smtprelay.Outcome) *told {
		return &told{m: m, err: &smtprelay.Error{Op: smtprelay.OpEnd, Outcome: o}}
	}
	for _, test := range []struct {
		why   string
		takes func(l *ledger)
		told  []*told
		want  tally // with the expected faults
	}{
		{why: "accepted and received", takes: func(l *ledger) { l.accept(sender(1), one.to, whole(one)) }, told: []*told{{m: one}}},
		{why: "accepted, not received", takes: func(*ledger) {}, told: []*told{{m: two}}, want: tally{lost: 1}},
		{why: "accepted, received by one of two", takes: func(l *ledger) { l.accept(sender(1), one.to[:1], whole(one)) }, told: []*told{{m: one}}, want: tally{lost: 1}},
		{why: "in two transactions", takes: func(l *ledger) {
			l.accept(sender(1), one.to[:1], whole(one))
			l.accept(sender(1), one.to[1:], whole(one))
		}, told: []*told{{m: one}}},
		{why: "received twice", takes: func(l *ledger) {
			l.accept(sender(2), two.to, whole(two))
			l.accept(sender(2), two.to, whole(two))
		}, told: []*told{{m: two}}, want: tally{twice: 1}},
		{why: "sent again, received twice", takes: func(l *ledger) {
			l.accept(sender(2), two.to, whole(two))
			l.accept(sender(2), two.to, whole(two))
		}, told: []*told{failed(two, smtprelay.NotAccepted), {m: two}}, want: tally{twice: 1}},
		{why: "sent again, received once", takes: func(l *ledger) { l.accept(sender(2), two.to, whole(two)) },
			told: []*told{failed(two, smtprelay.NotAccepted), {m: two}}},
		{why: "not accepted, received", takes: func(l *ledger) { l.accept(sender(2), two.to, whole(two)) },
			told: []*told{failed(two, smtprelay.NotAccepted)}, want: tally{falseNegatives: 1}},
		{why: "not accepted, not received", takes: func(*ledger) {}, told: []*told{failed(two, smtprelay.NotAccepted)}},
		{why: "unknown, received", takes: func(l *ledger) { l.accept(sender(2), two.to, whole(two)) }, told: []*told{failed(two, smtprelay.Unknown)}},
		{why: "unknown, not received", takes: func(*ledger) {}, told: []*told{failed(two, smtprelay.Unknown)}},
		{why: "truncated", takes: func(l *ledger) { l.accept(sender(2), two.to, whole(two)[:4999]) },
			told: []*told{failed(two, smtprelay.Unknown)}, want: tally{truncated: 1}},
		{why: "truncated to nothing", takes: func(l *ledger) { l.accept(sender(2), two.to, nil) },
			told: []*told{failed(two, smtprelay.Unknown)}, want: tally{truncated: 1}},
		{why: "truncated between lines", takes: func(l *ledger) {
			b := whole(two)
			l.accept(sender(2), two.to, b[:bytes.LastIndex(b[:3000], []byte("\r\n"))+2])
		}, told: []*told{failed(two, smtprelay.Unknown)}, want: tally{truncated: 1}},
		{why: "another's body", takes: func(l *ledger) { l.accept(sender(2), two.to, whole(one)) }, told: []*told{{m: two}}, want: tally{mixed: 1}},
		{why: "doubled", takes: func(l *ledger) { l.accept(sender(2), two.to, append(whole(two), whole(two)...)) }, told: []*told{{m: two}}, want: tally{mixed: 1}},
		{why: "the rest of another's body", takes: func(l *ledger) { l.accept(sender(2), two.to, append(whole(one)[:2500:2500], whole(two)[2500:]...)) },
			told: []*told{{m: two}}, want: tally{mixed: 1}},
		{why: "tiny", takes: func(l *ledger) { l.accept(sender(3), tiny.to, []byte("3\r\n")) }, told: []*told{{m: tiny}}},
		{why: "tiny and another", takes: func(l *ledger) { l.accept(sender(3), tiny.to, []byte("4\r\n")) }, told: []*told{{m: tiny}}, want: tally{mixed: 1}},
		{why: "to a stranger too", takes: func(l *ledger) { l.accept(sender(2), []string{two.to[0], tiny.to[0]}, whole(two)) },
			told: []*told{{m: two}, failed(tiny, smtprelay.Unknown)}, want: tally{strangers: 1}},
		{why: "smuggled", takes: func(l *ledger) { l.accept("ceo@x.example", []string{"victim@y.example"}, []byte("Send money.\r\n")) },
			want: tally{mixed: 1, strangers: 1}},
		{why: "no error, but a refused recipient", takes: func(l *ledger) { l.accept(sender(1), one.to[:1], whole(one)) },
			told: []*told{{m: one, receipt: smtprelay.Receipt{Recipients: []smtprelay.RecipientResult{
				{To: one.to[0], Outcome: smtprelay.Accepted}, {To: one.to[1], Outcome: smtprelay.NotAccepted}}}}}, want: tally{others: 1}},
	} {
		t.Run(test.why, func(t *testing.T) {
			l := newLedger(all)
			test.takes(l)
			a := l.judge(test.told)
			faulty := a.faulty
			a.sends, a.accepted, a.notAccepted, a.unknown, a.faulty = 0, 0, 0, 0, nil
			if a.String() != test.want.String() {
				t.Errorf("found %v\nwant  %v\n%q", &a, &test.want, faulty)
			}
		})
	}
}

// TestBodiesAreRecognised truncates a body of each size at every place.
func TestBodiesAreRecognised(t *testing.T) {
	for size := 1; size < 400; size++ {
		m := &message{id: 77, size: size}
		b := m.appendBody(nil)
		if len(b) != size {
			t.Fatalf("a body of %d octets has %d", size, len(b))
		}
		if fault, detail := m.inspect(b); fault != "" {
			t.Fatalf("a whole body of %d octets is %s: %s", size, fault, detail)
		}
		for cut := range size {
			if fault, _ := m.inspect(b[:cut]); fault != "truncated" {
				t.Fatalf("%d octets of %d: %q", cut, size, fault)
			}
		}
	}
}

// TestOnlyTheLeakOfGoSMTPIsLeftOut checks that all goroutines but go-smtp's leak are counted.
func TestOnlyTheLeakOfGoSMTPIsIgnored(t *testing.T) {
	const (
		leak    = "github.com/emersion/go-smtp.(*Conn).handleBdat.func1()\n\tconn.go:1072 +0x1\n"
		created = "created by github.com/emersion/go-smtp.(*Conn).handleBdat in goroutine 7\n\tconn.go:1047 +0x2"
		backend = "github.com/smtprelay/smtprelay/internal/test/sockets.(*session).Data(0x1)\n\trelay_test.go:1 +0x3\n"
	)
	for g, want := range map[string]bool{
		"goroutine 8 [chan send]:\n" + leak + created:                                                    false,
		"goroutine 8 [chan send, 2 minutes]:\n" + leak + created:                                         false,
		"goroutine 8 [sync.Mutex.Lock]:\n" + leak + created:                                              true,
		"goroutine 8 [chan send]:\n" + backend + leak + created:                                          true,
		"goroutine 8 [chan send]:\ngithub.com/emersion/go-smtp.(*Server).Serve(0x1)\n\tserver.go:1 +0x1": true,
		"goroutine 8 [chan send]:\ngithub.com/smtprelay/smtprelay.(*pool).take(0x1)\n\tpool.go:1 +0x1":   true,
		"goroutine 8 [chan send]:\ntesting.(*T).Run(0x1)\n\ttesting.go:1 +0x1":                           false,
	} {
		if got := isOurs(g); got != want {
			t.Errorf("isOurs is %v for\n%s", got, g)
		}
	}
}
