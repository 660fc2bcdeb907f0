package sockets

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Situations in which the client once broke a promise, each in the form that showed it best.

var cancels = flag.Int("sockets.cancels", 1000, "minimum number of Sends of TestCancelInAWrite for each relay")

// check fails the test unless the judgement is clean.
func check(t *testing.T, a tally) {
	t.Helper()
	t.Log(&a)
	if a.bad() > 0 {
		t.Errorf("broken promises:\n\t%s", strings.Join(a.faulty, "\n\t"))
	}
}

// TestCancelInAWrite cancels contexts at any point of a body: no part may be accepted as the whole.
func TestCancelInAWrite(t *testing.T) {
	for _, by := range []string{"data", "chunks"} {
		for _, kind := range []relayMake{goSMTPClear, smtptestClear, smtptestTLS} {
			t.Run(fmt.Sprintf("%s/%s", kind, by), func(t *testing.T) {
				t.Parallel()
				var all tally
				for all.sends < *cancels {
					r := &round{setup: setup{kind: kind, chunking: by == "chunks", maxConns: 8}}
					for sender := range 8 {
						var ms []*message
						for n := range 50 {
							id := 1 + sender*1000 + n
							hurry := 1500 * time.Microsecond << (2 * rand.N(3)) // a loaded machine takes longer to reach the body
							ms = append(ms, &message{id: id, to: []string{recipient("ok", 0, id)}, size: 61 << 10, deadline: rand.N(hurry)})
						}
						r.senders = append(r.senders, ms)
					}
					a := r.run(t)
					all.add(a)
					all.faulty = append(all.faulty, a.faulty...)
				}
				all.faulty = all.faulty[:min(len(all.faulty), 8)]
				check(t, all)
			})
		}
	}
}

// TestReceiptBehindDiscardedCommands has a relay discard what arrived after a final dot. The missing replies shift the later
// ones: none may be taken for the reply to another message.
func TestReceiptBehindDiscardedCommands(t *testing.T) {
	for _, by := range []string{"data", "chunks"} {
		for _, conns := range []int{1, 3} {
			t.Run(fmt.Sprintf("%s/%d connections", by, conns), func(t *testing.T) {
				t.Parallel()
				r := &round{setup: setup{kind: smtptestClear, chunking: by == "chunks", maxConns: conns,
					behind: smtptest.HabitDiscard, dotDelay: 5 * time.Millisecond}}
				for n := range 40 {
					r.senders = append(r.senders, []*message{{id: 1 + n, to: []string{recipient("ok", 0, 1+n)}, size: 500 + n, deadline: -1}})
				}
				check(t, r.run(t))
			})
		}
	}
}

// TestSlotUntilARefusedQuitHasClosed has a relay refuse the QUIT after a final dot and keep the connection as long as the client
// does. The next connection must not be opened before the relay has closed this one.
func TestSlotUntilARefusedQuitHasClosed(t *testing.T) {
	for _, kind := range []relayMake{smtptestClear, smtptestTLS} {
		for _, by := range []string{"data", "chunks"} {
			t.Run(fmt.Sprintf("%s/%s", kind, by), func(t *testing.T) {
				t.Parallel()
				r := &round{setup: setup{kind: kind, chunking: by == "chunks", maxConns: 1, behind: smtptest.HabitRefuse, proxied: true}, calm: true}
				r.limits.MaxMessagesPerConn = 1
				for n := range 3 {
					r.senders = append(r.senders, []*message{{id: 1 + n, to: []string{recipient("ok", 0, 1+n)}, size: 500 + n, deadline: -1}})
				}
				check(t, r.run(t))
			})
		}
	}
}

// smuggled are bodies that become a message to a victim if a relay reads them as commands.
var smuggled = []string{
	"Subject: a question\r\n\r\nhello\r\nMAIL FROM:<ceo@x.example>\r\nRCPT TO:<victim@y.example>\r\nDATA\r\nSubject: smuggled\r\n\r\nSend money.\r\n.\r\n",
	"Subject: a question\r\n\r\nhello\r\nRCPT TO:<victim@y.example>\r\nDATA\r\nSubject: smuggled\r\n\r\nSend money.\r\n.\r\n",
}

// TestBodyIsNoCommands sends these bodies to a relay that refuses the envelope and does not discard the chunk that it refuses
// with it.
func TestBodyIsNoCommands(t *testing.T) {
	for _, relay := range []relayMake{strictTLS, smtptestTLS} {
		for _, refuses := range []string{"RCPT", "MAIL", "AUTH"} {
			for b := range smuggled {
				for kind := range bodyKinds {
					t.Run(fmt.Sprintf("%s/%s refused/body %d/kind %d", relay, refuses, b, kind), func(t *testing.T) {
						r := &round{setup: setup{kind: relay, chunking: true, maxConns: 1}}
						r.habits = habits{readsRefusedChunks: true, refusesMail: refuses == "MAIL", refusesAuth: refuses == "AUTH"}
						r.password = map[string]string{"AUTH": "wrong"}[refuses]
						for n := range 3 { // the first uses a new connection, the others a used one
							id := 1 + n
							r.senders = append(r.senders, []*message{
								{id: id, to: []string{recipient("gone", 0, id)}, raw: smuggled[b], kind: kind, deadline: -1},
								{id: 10 + id, to: []string{recipient("ok", 0, 10+id)}, size: 300, deadline: -1},
								{id: 20 + id, to: []string{recipient("gone", 0, 20+id)}, raw: smuggled[b], kind: kind, deadline: -1},
							})
						}
						check(t, r.run(t))
					})
				}
			}
		}
	}
}

// TestEnvelopeThatStays has a relay answer RSET with 250 but keep the envelope, so that the next message goes to it too.
func TestEnvelopeThatStays(t *testing.T) {
	// The first message has a refused recipient, so it is not sent, and its other recipient stays. The third leaves its
	// sender.
	ms := []*message{
		{id: 1, to: []string{recipient("ok", 0, 1), recipient("gone", 1, 1)}, all: true, size: 300, deadline: -1},
		{id: 2, to: []string{recipient("ok", 0, 2)}, size: 300, deadline: -1},
		{id: 3, to: []string{recipient("gone", 0, 3)}, size: 300, deadline: -1},
		{id: 4, to: []string{recipient("ok", 0, 4)}, size: 300, deadline: -1},
	}
	for _, relay := range []relayMake{strictClear, smtptestClear} {
		for name, senders := range map[string][][]*message{
			"one after the other": {ms},
			"at once":             {ms[:1], ms[1:2], ms[2:3], ms[3:]},
		} {
			for _, pipelining := range []smtprelay.Pipelining{smtprelay.PipelineAuto, smtprelay.PipelineWithin, smtprelay.PipelineOff} {
				t.Run(fmt.Sprintf("%s/data/%s/pipelining %d", relay, name, pipelining), func(t *testing.T) {
					r := &round{setup: setup{kind: relay, maxConns: 1, habits: habits{keepsEnvelope: true}}, pipelining: pipelining, senders: senders}
					check(t, r.run(t))
				})
				// In chunks the body may have been sent with the envelope, after another message's end. The client cannot control
				// who gets it then, but it must report it truthfully.
				t.Run(fmt.Sprintf("%s/chunks/%s/pipelining %d", relay, name, pipelining), func(t *testing.T) {
					r := &round{setup: setup{kind: relay, chunking: true, maxConns: 1, habits: habits{keepsEnvelope: true}}, pipelining: pipelining, senders: senders}
					r.told = func(led *ledger, all []*told) {
						for _, e := range led.entries {
							for _, told := range all {
								if o, _ := told.outcome(); o != smtprelay.Unknown && idOf(e.from) != told.m.id && strings.Contains(strings.Join(e.to, " "), told.m.to[0]) {
									led.complain("message %d went with the envelope of message %d, but was reported as %v: %v", told.m.id, idOf(e.from), o, told.err)
								}
							}
						}
					}
					a := r.run(t)
					if len(senders) > 1 && pipelining == smtprelay.PipelineAuto {
						a.strangers, a.mixed = 0, 0
					}
					check(t, a)
				})
			}
		}
	}
}
