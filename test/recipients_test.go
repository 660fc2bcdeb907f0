// Messages with several recipients: how many share one transaction, and that each keeps its own reply.
package test

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

// 452 to a recipient means that the others may have another transaction; so does 552 from old relays (RFC 5321, 4.5.3.1.10). Each
// recipient gets the message once. With AllOrNothing none gets it, since it could not be taken back.
func TestTooManyRecipientsGoInFurtherTransactions(t *testing.T) {
	for _, reply := range []string{"452 4.5.3 Too many recipients", "452 too many", "552 too many recipients", "451 4.5.3 Too many recipients"} {
		t.Run(reply, func(t *testing.T) {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				const most, recipients = 10, 95
				relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxRecipients = -1 })
				relay.Fault(smtptest.Fault{
					At: smtptest.Rcpt, Reply: reply, Count: -1,
					When: func(e smtptest.Event) bool { return len(e.To) >= most },
				})
				client := newClient(t, configOf(relay))
				m := numbered(0)
				m.To = moreRecipients(recipients)
				m.AllOrNothing = true
				_, err := client.Send(t.Context(), m)
				if e := failure(err); e.Outcome != smtprelay.NotAccepted || relay.Stats().Accepted != 0 {
					t.Errorf("AllOrNothing: %v, and the relay has accepted %d messages; want none", err, relay.Stats().Accepted)
				}

				m.AllOrNothing = false
				receipt, err := client.Send(t.Context(), m)
				if err != nil {
					t.Fatal(err)
				}
				ids := map[string][]string{}
				for _, got := range relay.Messages() {
					for _, to := range got.To {
						ids[to] = append(ids[to], got.ID)
					}
				}
				want(t, "recipients", len(ids), recipients)
				want(t, "transactions", relay.Stats().Accepted, (recipients+most-1)/most)
				for _, r := range receipt.Recipients {
					if len(ids[r.To]) != 1 || ids[r.To][0] != r.QueueID || r.Outcome != smtprelay.Accepted {
						t.Errorf("%s: %v as %q; the relay has %q", r.To, r.Outcome, r.QueueID, ids[r.To])
					}
				}
			})
		})
	}
}

// limitRcpts makes relay accept n recipients in a transaction, and refuse others.
func limitRcpts(relay *smtptest.Server, n int) {
	relay.Fault(smtptest.Fault{
		At: smtptest.Rcpt, Reply: "452 4.5.3 Too many recipients", Count: -1,
		When: func(e smtptest.Event) bool { return len(e.To) >= n },
	})
}

func TestNumberOfRecipientsIsLearntWithinAMessage(t *testing.T) {
	for _, tt := range []struct{ most, recipients, commands int }{
		{1, 1000, 4500},
		{50, 2000, 2000 + 950 + 2*40 + 150}, // the first transaction, and sometimes a few too many
	} {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxRecipients = -1 })
			limitRcpts(relay, tt.most)
			m := numbered(0)
			m.To = moreRecipients(tt.recipients)
			if _, err := newClient(t, relay.Config()).Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			all := 0
			for _, verb := range []string{"EHLO", "RSET", "MAIL", "RCPT", "DATA", "BDAT", "QUIT"} {
				all += commands(relay, verb)
			}
			if all > tt.commands {
				t.Errorf("%d recipients, %d in a transaction: %d commands, want at most %d", tt.recipients, tt.most, all, tt.commands)
			}
		})
	}
}

func TestNumberOfRecipientsIsRememberedForAWhile(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxRecipients = -1 })
		limitRcpts(relay, 50)
		client := newClient(t, relay.Config())
		send := func() (rcpts int) {
			before := commands(relay, "RCPT")
			m := numbered(0)
			m.To = moreRecipients(1000)
			if _, err := client.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			return commands(relay, "RCPT") - before
		}
		if n := send(); n < 1950 {
			t.Errorf("at first: %d RCPT commands, want all 1000 offered at once", n)
		}
		if n := send(); n > 1050 {
			t.Errorf("then: %d RCPT commands, want 1000 and a few", n)
		}
		time.Sleep(11 * time.Minute)
		if n := send(); n < 1950 {
			t.Errorf("after eleven minutes: %d RCPT commands, want all 1000 offered at once", n)
		}
	})
}

// Postfix hangs up at the twentieth refusal of a session. The number accepted by then is the limit; nothing is unknown, since the
// message was never sent.
func TestRelayThatClosesOnTooManyRecipientsTeachesTheLimit(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxRecipients = -1 })
		var refused atomic.Int64
		relay.Fault(smtptest.Fault{
			At: smtptest.Rcpt, Reply: "421 4.7.0 Error: too many errors", Drop: true,
			When: func(smtptest.Event) bool { return refused.Load() == 20 },
		})
		relay.Fault(smtptest.Fault{
			At: smtptest.Rcpt, Reply: "452 4.5.3 Error: too many recipients", Count: -1,
			When: func(e smtptest.Event) bool {
				if len(e.To) < 50 {
					return false
				}
				refused.Add(1)
				return true
			},
		})
		client := newClient(t, relay.Config())
		if _, err := client.Send(t.Context(), numbered(1)); err != nil { // right after AUTH the body would wait for all replies
			t.Fatal(err)
		}
		m := numbered(0)
		m.To = moreRecipients(200)
		if _, err := client.Send(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		want(t, "transactions", relay.Stats().Accepted, 1+4)
		want(t, "connections", len(relay.Conns()), 2)
	})
}

// A full mailbox has the same code as too many recipients.
func TestFullMailboxesTeachNoLimit(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		var lifted atomic.Bool
		relay.Fault(smtptest.Fault{
			At: smtptest.Rcpt, Reply: "452 4.2.2 mailbox full", Count: -1,
			When: func(e smtptest.Event) bool { return !lifted.Load() && e.Rcpt != "r1@y.example" },
		})
		client := newClient(t, relay.Config())
		m := numbered(0)
		m.To = moreRecipients(5)
		for range 2 {
			_, err := client.Send(t.Context(), m)
			want(t, "refused", missed(err), 4)
		}
		lifted.Store(true)
		before := relay.Stats().Accepted
		if _, err := client.Send(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		want(t, "transactions", relay.Stats().Accepted-before, 1)
	})
}

func TestThousandRecipientsShareATransactionByDefault(t *testing.T) {
	for _, tt := range []struct {
		why                    string
		max, recipients, as    int
		allOrNothing, onceOnly bool
	}{
		{why: "a thousand", recipients: 1000, as: 1},
		{why: "more than that", recipients: 2001, as: 3},
		{why: "no limit", max: -1, recipients: 2001, as: 1},
		{why: "AllOrNothing is one transaction", recipients: 2001, as: 1, allOrNothing: true},
		{why: "so is a body that can be read only once", recipients: 2001, as: 1, onceOnly: true},
	} {
		t.Run(tt.why, func(t *testing.T) {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxRecipients = -1 })
				cfg := relay.Config()
				cfg.Limits.MaxRecipients = tt.max
				m := numbered(0)
				m.To, m.AllOrNothing = moreRecipients(tt.recipients), tt.allOrNothing
				if tt.onceOnly {
					m.Body = smtprelay.Reader(struct{ io.Reader }{strings.NewReader("Subject: once\r\n\r\nonce\r\n")})
				}
				if _, err := newClient(t, cfg).Send(t.Context(), m); err != nil {
					t.Fatal(err)
				}
				want(t, "transactions", relay.Stats().Accepted, tt.as)
			})
		})
	}
}

// moreRecipients returns the recipients of a call with more=n.
func moreRecipients(n int) (to []string) {
	for i := range n {
		to = append(to, fmt.Sprintf("r%d@y.example", i+1))
	}
	return to
}

// byteReads limits each Read to one octet.
type byteReads struct{ net.Conn }

func (c byteReads) Read(p []byte) (int, error) { return c.Conn.Read(p[:min(1, len(p))]) }

// 1,000 recipients through a window of 4 KiB, with replies read octet by octet, one in ten refused in three lines: no deadlock,
// and no reply is taken for another.
func TestThousandRecipientsThroughANarrowWindow(t *testing.T) {
	for _, pipelining := range []smtprelay.Pipelining{smtprelay.PipelineAuto, smtprelay.PipelineWithin, smtprelay.PipelineOff} {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			relay := newRelay(t, near, func(s *smtptest.Server) {
				s.Buffer = 4096
				s.Reject = map[string]string{}
				for i := 0; i < 1000; i += 10 {
					s.Reject[fmt.Sprintf("r%d@y.example", i)] = fmt.Sprintf("550-5.1.1 no such user\n550-5.1.1 r%d is unknown\n550 5.1.1 here", i)
				}
			})
			cfg := configOf(relay)
			cfg.Pipelining = pipelining
			cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				conn, err := relay.Dial(ctx, network, addr)
				return byteReads{conn}, err
			}
			client := newClient(t, cfg)
			m := numbered(0)
			m.To = nil
			for i := range 1000 {
				m.To = append(m.To, fmt.Sprintf("r%d@y.example", i))
			}
			receipt, err := client.Send(t.Context(), m)
			if e := failure(err); e.Outcome != smtprelay.Accepted || missed(err) != 100 {
				t.Fatalf("%v; want it accepted for 900 of 1,000", err)
			}
			for i, r := range receipt.Recipients {
				switch refused := i%10 == 0; {
				case !refused && r.Outcome != smtprelay.Accepted:
					t.Errorf("%s: %v", r.To, r.Outcome)
				case refused && (r.Outcome != smtprelay.NotAccepted || !strings.Contains(r.Reply.Message, fmt.Sprintf("r%d is unknown", i))):
					t.Errorf("%s: %v, %q", r.To, r.Outcome, r.Reply.Message)
				}
			}
			got := relay.Messages()
			want(t, "messages", len(got), 1)
			want(t, "recipients", len(got[0].To), 900)
		})
	}
}

func TestAllOrNothingUsesASessionWithRoomForItsDomains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Dial: relaytest.Dial(0, func(n int, l string) string {
			return relaytest.Agree("250-PIPELINING\n250 LIMITS RCPTDOMAINMAX=2", l)
		})})
		for i, to := range [][]string{{"b@x.example"}, {"b@y.example", "c@z.example"}} {
			if err := c.SendMail("a@x.example", to, []byte("Subject: x\r\n\r\nx\r\n")); err != nil {
				t.Errorf("%d: %v", i, err)
			}
		}
		c.Close()
	})
}

func TestEachRecipientKeepsItsOwnReplyInAllOrNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bubbleClient(t, smtprelay.Config{Dial: relaytest.Dial(0, func(n int, l string) string {
			switch {
			case strings.Contains(l, "<b@"):
				return "550 5.1.1 no b"
			case strings.Contains(l, "<c@"):
				return "451 4.7.1 c is greylisted"
			}
			return relaytest.Agree("250 PIPELINING", l)
		})})
		m := shortMessage("b@y.example", "c@y.example", "d@y.example")
		m.AllOrNothing = true
		r, err := c.Send(t.Context(), m)
		if err == nil {
			t.Error("no error")
		}
		if r.Recipients[1].Reply.Code != 451 {
			t.Errorf("c: %v", r.Recipients[1].Reply)
		}
		c.Close()
	})
}

// If a relay answers a command twice, the client notices before it acts on the replies: each later one would be taken for the
// reply to the command before it, and a 250 to a chunk for the acceptance of a message that is refused.
func TestExtraReplyIsNoticedBeforeTheBodyIsSent(t *testing.T) {
	for _, at := range []smtptest.Step{smtptest.Mail, smtptest.Rcpt} {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			relay := newRelay(t, near)
			twice := relay.Fault(smtptest.Fault{At: at, Reply: "250 2.0.0 Ok\n250 2.0.0 Ok"})
			relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: time.Second, Reply: "554 5.6.0 no", Count: -1})
			cfg := configOf(relay)
			// The hook delays replies, so that a client that acts on them acts as early as it can.
			cfg.Trace = &smtprelay.Trace{Reply: func(context.Context, smtprelay.ReplyInfo) { time.Sleep(time.Millisecond) }}
			m := numbered(0)
			m.AllOrNothing = true // the body is sent when each recipient has its reply
			m.To = moreRecipients(2)
			_, err := newClient(t, cfg).Send(t.Context(), m)
			if e := failure(err); e.Outcome != smtprelay.NotAccepted || e.Reply.Code != 554 {
				t.Errorf("two replies to %v: %v; want it not accepted, with 554", at, err)
			}
			want(t, "messages at the relay", relay.Stats().Accepted, 0)
			want(t, "doubled replies", twice.Hits(), 1)
		})
	}
}
