// What decides about sending again: OutcomeOf, ShouldRetry, RetryTo and Error's Scope and Op, for a relay's replies and faults at
// each step, by DATA and in chunks.
package test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// decision is everything that is reported about sending again.
type decision struct {
	op      smtprelay.Op
	scope   smtprelay.Scope
	outcome smtprelay.Outcome
	retry   bool
	to      string // the recipients of RetryTo, by number
}

func decisionOf(err error) decision {
	e := failure(err)
	d := decision{op: e.Op, scope: e.Scope, outcome: smtprelay.OutcomeOf(err), retry: smtprelay.ShouldRetry(err)}
	to := smtprelay.RetryTo(err)
	for i, r := range e.Recipients {
		if slices.Contains(to, r.To) {
			d.to += fmt.Sprint(i + 1)
		}
	}
	return d
}

func TestErrorDecidesAboutSendingAgain(t *testing.T) {
	const (
		never, maybe, some = smtprelay.NotAccepted, smtprelay.Unknown, smtprelay.Accepted
		rcpt, message      = smtprelay.ScopeRecipient, smtprelay.ScopeMessage
		relayed            = smtprelay.ScopeRelay
	)
	says := func(at smtptest.Step, reply string) smtptest.Fault {
		return smtptest.Fault{At: at, Reply: reply, Count: -1}
	}
	to := func(n int, reply string) smtptest.Fault {
		return smtptest.Fault{At: smtptest.Rcpt, Rcpt: fmt.Sprintf("r%d@y.example", n), Reply: reply, Count: -1}
	}
	lost := func(at smtptest.Step) smtptest.Fault { return smtptest.Fault{At: at, Drop: true, Count: -1} }
	for _, tt := range []struct {
		why    string
		faults []smtptest.Fault // bodyStepOf stands for DATA or BDAT
		all    bool             // AllOrNothing
		want   decision
	}{
		// Until the relay replies about the message, a failure is not the message's fault, whatever the code.
		{"554 in place of a greeting: no service here (RFC 5321, 3.1)", []smtptest.Fault{says(smtptest.Connect, "554 5.3.2 no SMTP here")}, false,
			decision{smtprelay.OpGreeting, relayed, never, true, "12"}},
		{"421 in place of a greeting", []smtptest.Fault{says(smtptest.Connect, "421 4.3.2 not now")}, false,
			decision{smtprelay.OpGreeting, relayed, never, true, "12"}},
		{"535 authentication credentials invalid (RFC 4954, 6): a key can be changed", []smtptest.Fault{says(smtptest.Auth, "535 5.7.8 no")}, false,
			decision{smtprelay.OpAuth, relayed, never, true, "12"}},
		{"454 temporary authentication failure (RFC 4954, 6)", []smtptest.Fault{says(smtptest.Auth, "454 4.7.0 later")}, false,
			decision{smtprelay.OpAuth, relayed, never, true, "12"}},
		{"lost before the greeting", []smtptest.Fault{lost(smtptest.Connect)}, false, decision{smtprelay.OpGreeting, relayed, never, true, "12"}},

		// MAIL.
		{"550 to MAIL: not from this sender (RFC 5321, 4.2.2)", []smtptest.Fault{says(smtptest.Mail, "550 5.7.1 not you")}, false,
			decision{smtprelay.OpMail, message, never, false, ""}},
		{"451 to MAIL: local error (RFC 5321, 4.2.2)", []smtptest.Fault{says(smtptest.Mail, "451 4.3.0 error")}, false,
			decision{smtprelay.OpMail, message, never, true, "12"}},
		{"530 to MAIL: authentication required (RFC 4954, 6) is not about the message", []smtptest.Fault{says(smtptest.Mail, "530 5.7.0 authenticate")}, false,
			decision{smtprelay.OpMail, relayed, never, true, "12"}},
		{"421 to MAIL: service not available (RFC 5321, 3.8)", []smtptest.Fault{says(smtptest.Mail, "421 4.3.2 closing")}, false,
			decision{smtprelay.OpMail, relayed, never, true, "12"}},

		// RCPT.
		{"550 to every RCPT: mailbox unavailable (RFC 5321, 4.2.2)", []smtptest.Fault{says(smtptest.Rcpt, "550 5.1.1 nobody")}, false,
			decision{smtprelay.OpRcpt, rcpt, never, false, ""}},
		{"450 to every RCPT: mailbox busy (RFC 5321, 4.2.2)", []smtptest.Fault{says(smtptest.Rcpt, "450 4.2.1 busy")}, false,
			decision{smtprelay.OpRcpt, rcpt, never, true, "12"}},
		{"550 to one, 450 to the other: once more to the other", []smtptest.Fault{to(1, "550 5.1.1 nobody"), to(2, "450 4.2.1 busy")}, false,
			decision{smtprelay.OpRcpt, rcpt, never, true, "2"}},
		{"450 to one, the other got it", []smtptest.Fault{to(1, "450 4.2.1 busy")}, false, decision{smtprelay.OpRcpt, rcpt, some, false, "1"}},
		{"550 to one, the other got it", []smtptest.Fault{to(1, "550 5.1.1 nobody")}, false, decision{smtprelay.OpRcpt, rcpt, some, false, ""}},
		{"550 to one, all or nothing: the other cannot get it without", []smtptest.Fault{to(1, "550 5.1.1 nobody")}, true,
			decision{smtprelay.OpRcpt, rcpt, never, false, ""}},
		{"450 to one, all or nothing", []smtptest.Fault{to(1, "450 4.2.1 busy")}, true, decision{smtprelay.OpRcpt, rcpt, never, true, "12"}},

		// DATA and the end of the message.
		{"554 to DATA: no valid recipients (RFC 5321, 3.3)", []smtptest.Fault{says(bodyStepOf, "554 5.5.1 no")}, false,
			decision{smtprelay.OpData, message, never, false, ""}},
		{"451 to DATA", []smtptest.Fault{says(bodyStepOf, "451 4.3.0 later")}, false, decision{smtprelay.OpData, message, never, true, "12"}},
		{"554 to the end: transaction failed (RFC 5321, 4.2.2)", []smtptest.Fault{says(smtptest.FinalDot, "554 5.7.1 spam")}, false,
			decision{smtprelay.OpEnd, message, never, false, ""}},
		{"452 to the end: insufficient storage (RFC 5321, 4.2.2)", []smtptest.Fault{says(smtptest.FinalDot, "452 4.3.1 full")}, false,
			decision{smtprelay.OpEnd, message, never, true, "12"}},
		{"554 to the end, 450 to one recipient: its content is refused for all", []smtptest.Fault{to(1, "450 4.2.1 busy"), says(smtptest.FinalDot, "554 5.7.1 spam")}, false,
			decision{smtprelay.OpEnd, message, never, false, ""}},
		{"lost before the reply to the end (RFC 1047)", []smtptest.Fault{lost(smtptest.FinalDot)}, false, decision{smtprelay.OpEnd, relayed, maybe, false, ""}},
		{"the same, 450 to one recipient: that one cannot have it", []smtptest.Fault{to(1, "450 4.2.1 busy"), lost(smtptest.FinalDot)}, false,
			decision{smtprelay.OpEnd, relayed, maybe, false, "1"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				relay := newRelay(t, near)
				cfg := configOf(relay)
				cfg.Retry.MaxAttempts = 1
				client := newClient(t, cfg)
				for _, f := range tt.faults {
					if f.At == bodyStepOf {
						f.At = bodyStep(relay)
					}
					relay.Fault(f)
				}
				m := numbered(0)
				m.To, m.AllOrNothing = []string{"r1@y.example", "r2@y.example"}, tt.all
				receipt, err := client.Send(t.Context(), m)
				if got := decisionOf(err); got != tt.want {
					t.Errorf("got %+v, want %+v: %v", got, tt.want, err)
				}
				e := failure(err)
				if !slices.Equal(e.Recipients, receipt.Recipients) || len(e.Recipients) != 2 {
					t.Errorf("the error has %v, the receipt %v", e.Recipients, receipt.Recipients)
				}
				if temporary := e.Temporary(); temporary && !tt.want.retry || !temporary && e.Outcome == never && e.Reply.Code/100 == 4 {
					t.Errorf("temporary: %t", temporary)
				}
				if wrapped := fmt.Errorf("job 7: %w", err); decisionOf(wrapped) != decisionOf(err) {
					t.Errorf("when wrapped: %+v", decisionOf(wrapped))
				}
			})
		})
	}
}

// bodyStepOf stands for the command that begins the body, DATA or BDAT.
const bodyStepOf smtptest.Step = -1

func TestMessageOfAnEndedSendIsKept(t *testing.T) {
	errRefused := errors.New("connection refused")
	for _, tt := range []struct {
		why  string
		send func(t *testing.T, relay *smtptest.Server) error
		want decision
	}{
		{"its context has ended", func(t *testing.T, relay *smtptest.Server) error {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			return sendErr(ctx, newClient(t, relay.Config()), numbered(0))
		}, decision{smtprelay.OpCheck, smtprelay.ScopeCaller, smtprelay.NotAccepted, true, "1"}},
		{"the Client was closed", func(t *testing.T, relay *smtptest.Server) error {
			client := newClient(t, relay.Config())
			client.Close()
			return sendErr(t.Context(), client, numbered(0))
		}, decision{smtprelay.OpWait, smtprelay.ScopeCaller, smtprelay.NotAccepted, true, "1"}},
		{"no connection can be opened", func(t *testing.T, relay *smtptest.Server) error {
			cfg := relay.Config()
			cfg.Retry.MaxAttempts = 1
			cfg.Dial = func(context.Context, string, string) (net.Conn, error) { return nil, errRefused }
			return sendErr(t.Context(), newClient(t, cfg), numbered(0))
		}, decision{smtprelay.OpDial, smtprelay.ScopeRelay, smtprelay.NotAccepted, true, "1"}},
		{"the message is wrong", func(t *testing.T, relay *smtptest.Server) error {
			m := numbered(0)
			m.From = ""
			return sendErr(t.Context(), newClient(t, relay.Config()), m)
		}, decision{smtprelay.OpCheck, smtprelay.ScopeMessage, smtprelay.NotAccepted, false, ""}},
		{"the relay lacks what it needs", func(t *testing.T, relay *smtptest.Server) error {
			m := numbered(0)
			m.MailOptions = &smtprelay.MailOptions{Priority: new(3)}
			return sendErr(t.Context(), newClient(t, relay.Config()), m)
		}, decision{smtprelay.OpCheck, smtprelay.ScopeMessage, smtprelay.NotAccepted, false, ""}},
		{"its body cannot be read now", func(t *testing.T, relay *smtptest.Server) error {
			m := numbered(0)
			m.Body = smtprelay.Reader(iotest.ErrReader(errors.New("disk on fire")))
			return sendErr(t.Context(), newClient(t, relay.Config()), m)
		}, decision{smtprelay.OpBody, smtprelay.ScopeMessage, smtprelay.NotAccepted, true, "1"}},
		{"its body is empty", func(t *testing.T, relay *smtptest.Server) error {
			m := numbered(0)
			m.Body = smtprelay.Reader(strings.NewReader(""))
			return sendErr(t.Context(), newClient(t, relay.Config()), m)
		}, decision{smtprelay.OpBody, smtprelay.ScopeMessage, smtprelay.NotAccepted, false, ""}},
		{"its Config is wrong", func(t *testing.T, _ *smtptest.Server) error {
			_, err := smtprelay.New(smtprelay.Config{Addr: "relay.example"})
			return err
		}, decision{smtprelay.OpConfig, smtprelay.ScopeCaller, smtprelay.NotAccepted, true, ""}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			if got := decisionOf(tt.send(t, newRelay(t))); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestErrorOfAWaitSaysWhetherTheRelayWasAtFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		cfg := configOf(relay)
		cfg.Limits.MaxConns, cfg.Pipelining, cfg.Retry.MaxAttempts = 1, smtprelay.PipelineWithin, smtprelay.NoLimit
		for _, tt := range []struct {
			why   string
			fault smtptest.Fault
			want  decision
		}{
			{"no connection could be opened", smtptest.Fault{At: smtptest.Connect, Drop: true, Count: -1},
				decision{smtprelay.OpWait, smtprelay.ScopeRelay, smtprelay.NotAccepted, true, "1"}},
			{"another message has the only one", smtptest.Fault{At: smtptest.Mail, Stall: true},
				decision{smtprelay.OpWait, smtprelay.ScopeCaller, smtprelay.NotAccepted, true, "1"}},
		} {
			client := newClient(t, cfg)
			stalled := relay.Fault(tt.fault)
			go client.Send(t.Context(), numbered(0)) // ends with Close
			synctest.Wait()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			if got := decisionOf(sendErr(ctx, client, numbered(1))); got != tt.want {
				t.Errorf("%s: got %+v, want %+v", tt.why, got, tt.want)
			}
			cancel()
			stalled.Remove()
			client.Close()
		}
	})
}

func TestClientClosedBetweenTwoTriesKeepsTheMessage(t *testing.T) {
	for _, reply := range []string{"451 4.3.0 later", "421 4.3.2 closing", "503 5.5.1 out of step"} {
		synctest.Test(t, func(t *testing.T) {
			relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true })
			cfg := configOf(relay)
			cfg.Retry = smtprelay.Retry{MaxAttempts: smtprelay.NoLimit, On4xx: true, MinBackoff: time.Hour, MaxBackoff: time.Hour}
			client := newClient(t, cfg)
			sendOne(t.Context(), client, 0) // what follows uses a used connection
			relay.Fault(smtptest.Fault{At: smtptest.Mail, Reply: reply, Count: -1})
			time.AfterFunc(time.Second, func() { client.Close() })
			err := sendErr(t.Context(), client, numbered(1))
			if got := decisionOf(err); !got.retry || got.to != "1" || got.outcome != smtprelay.NotAccepted {
				t.Errorf("%s: got %+v: %v", reply, got, err)
			}
		})
	}
}

// A message refused only because its connection was used up, and then stopped by the end of the Client before the next try, was
// not refused itself: a queue keeps it.
func TestMessageIsKeptIfTheClientIsClosedBetweenTwoTries(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		refused := relay.Fault(smtptest.Fault{At: smtptest.Mail, AfterMessages: 1, Reply: "550 5.7.0 Too many messages in this session", Count: -1})
		cfg := configOf(relay)
		cfg.Limits.MaxConns = 1
		client := newClient(t, cfg)
		if s := sendOne(t.Context(), client, 0); s.err != nil {
			t.Fatal(s.err)
		}
		relay.Fault(smtptest.Fault{At: smtptest.Connect, Stall: true, Count: -1})
		var second sent
		var sending sync.WaitGroup
		sending.Go(func() { second = sendOne(t.Context(), client, 1) })
		if err := refused.Wait(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		client.Close()
		sending.Wait()
		if !errors.Is(second.err, smtprelay.ErrClosed) || !smtprelay.ShouldRetry(second.err) || failure(second.err).Reply.Code != 0 || len(smtprelay.RetryTo(second.err)) != 1 {
			t.Errorf("%v; retry: %t, to %q", second.err, smtprelay.ShouldRetry(second.err), smtprelay.RetryTo(second.err))
		}
	})
}
