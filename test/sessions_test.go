// Limits of a session that a relay reports in its own words, and sessions that forget what was agreed.
package test

import (
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay/smtptest"
)

// A relay ends a session after five messages, in any words and at any step: no message fails.
func TestLimitOfASessionFailsNoMessageWhateverItsWords(t *testing.T) {
	for _, row := range []struct {
		at    smtptest.Step
		reply string
		drop  bool
	}{
		{smtptest.Mail, "452 4.4.5 Maximum number of messages per session exceeded.", false},
		{smtptest.Mail, "421 4.7.0 Too many messages in this connection", true},
		{smtptest.Mail, "450 4.7.1 Error: too many messages in this session", false},
		{smtptest.Mail, "451 4.3.0 Come back later", false},
		{smtptest.Mail, "452 4.5.3 Too many recipients received this session", false},
		{smtptest.Mail, "550 5.7.0 Too many messages in this session", false},
		{smtptest.Mail, "554 5.5.0 exceeded maximum number of messages per connection", false},
		{smtptest.Data, "451 4.3.0 Come back later", false},
		{smtptest.Data, "452 4.4.5 Maximum number of messages per session exceeded.", false},
		{smtptest.Data, "550 5.7.0 Too many messages in this session", false},
		{smtptest.Rcpt, "452 4.5.3 Too many recipients in this session", false},
		{smtptest.Rcpt, "450 4.7.1 Too many messages in this session", false},
	} {
		for _, conns := range []int{1, 10} {
			for _, senders := range []int{1, 40} {
				if conns > 1 && senders > 1 && strings.HasSuffix(row.reply, "Come back later") {
					continue // a reply that says nothing about connections is taken for one at most three times
				}
				inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
					relay := newRelay(t, near)
					at := row.at
					if at == smtptest.Data {
						at = bodyStep(relay)
					}
					relay.Fault(smtptest.Fault{At: at, AfterMessages: 5, Reply: row.reply, Drop: row.drop, Count: -1})
					cfg := configOf(relay)
					cfg.Limits.MaxConns = conns
					client := newClient(t, cfg)
					began := time.Now()
					var all []sent
					for len(all) < 40 {
						all = append(all, sendAtOnce(t.Context(), client, len(all), senders)...)
					}
					allAccepted(t, relay, all)
					if took := time.Since(began); took > 10*time.Second {
						t.Errorf("%v %q, MaxConns %d: took %v", row.at, row.reply, conns, took)
					}
					atMost(t, "connections", len(relay.Conns()), 8+2*conns)
				})
			}
		}
	}
}

// From the second message on a session requires AUTH, although it has authenticated.
func TestSessionThatForgetsItsLoginFailsNoMessage(t *testing.T) {
	for _, reply := range []string{
		"530 5.7.1 Authentication required", "503 5.5.1 AUTH first", "502 5.7.0 Please authenticate first",
		"550 5.7.1 Authentication required", "554 5.7.0 You must log in first", "451 4.7.0 Please log in again",
	} {
		for _, conns := range []int{1, 3} {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				relay := newRelay(t, near)
				relay.Fault(smtptest.Fault{At: smtptest.Mail, AfterMessages: 1, Reply: reply, Count: -1})
				cfg := configOf(relay)
				cfg.Limits.MaxConns = conns
				client := newClient(t, cfg)
				all := sendAtOnce(t.Context(), client, 0, 6)
				for len(all) < 12 {
					all = append(all, sendAtOnce(t.Context(), client, len(all), 1)...)
				}
				allAccepted(t, relay, all)
			})
		}
	}
}

// A relay refuses RSET. The message after it was never offered: it does not fail, whatever MaxAttempts is, and later refusals of
// recipients do not each cost a connection.
func TestRefusedRSETFailsNoMessage(t *testing.T) {
	for _, reply := range []string{"502 5.5.1 Unimplemented", "500 5.5.2 What?", "503 5.5.1 Bad sequence", "550 5.7.1 No", "451 4.3.0 Later", "421 4.3.0 Bye"} {
		for _, attempts := range []int{0, 1} {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				relay := newRelay(t, near)
				relay.Fault(smtptest.Fault{At: smtptest.Rset, Reply: reply, Drop: reply[0] == '4' && reply[1] == '2', Count: -1,
					When: func(e smtptest.Event) bool { return e.Message > 0 }}) // not at the probe for refused chunks
				relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "bad@example.org", Reply: "550 5.1.1 no such user", Count: -1})
				cfg := configOf(relay)
				cfg.Retry.MaxAttempts = attempts
				client := newClient(t, cfg)
				var good []sent
				for i := range 20 {
					m := numbered(1000 + i)
					m.To = []string{"bad@example.org"}
					if _, err := client.Send(t.Context(), m); failure(err).Reply.Code != 550 {
						t.Errorf("%s, MaxAttempts %d: %v", reply, attempts, err)
					}
					good = append(good, sendOne(t.Context(), client, i))
				}
				allAccepted(t, relay, good)
				if reply[:2] == "50" && reply[2] != '3' {
					atMost(t, reply+": connections", len(relay.Conns()), 3)
				}
			})
		}
	}
}

// A session that refuses each message quickly does not attract the messages of all others.
func TestSessionThatRefusesQuicklyIsNotPreferred(t *testing.T) {
	for _, reply := range []string{"451 4.3.0 Come back later", "530 5.7.0 Log in first", "452 4.3.1 Insufficient system storage"} {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			relay := newRelay(t, near)
			cfg := configOf(relay)
			cfg.Limits.MaxConns = 3
			client := newClient(t, cfg)
			noneFailed(t, sendAtOnce(t.Context(), client, 0, 30))
			relay.Fault(smtptest.Fault{At: smtptest.Mail, Reply: reply, Count: -1, When: func(e smtptest.Event) bool { return e.Conn == 1 && e.Accepted > 0 }})
			relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: time.Second, Count: -1})
			all := sendAtOnce(t.Context(), client, 100, 60)
			noneFailed(t, all)
		})
	}
}
