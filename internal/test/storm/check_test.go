// Tests that the storm's relay and judge notice faults. A storm whose relay or judge misses faults finds nothing.
package storm

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
)

// stormBodyOf is a well-formed body of message id, dot-stuffed and with its final dot.
func stormBodyOf(id int) string {
	text := "one\r\n.two\r\n"
	return fmt.Sprintf("Subject: storm\r\nX-Storm: %d %d %d\r\n\r\none\r\n..two\r\n.\r\n", id, len(text), stormSum([]byte(text)))
}

// TestStormRelayIsStrict talks to the storm's relay by hand: a relay that accepts a fault of the client makes a storm that finds
// nothing.
func TestStormRelayIsStrict(t *testing.T) {
	const envelope = "MAIL FROM:<s.m1@storm.example>\r\nRCPT TO:<ok0.m1@y.example>\r\nDATA\r\n"
	const second = "MAIL FROM:<s.m2@storm.example>\r\nRCPT TO:<ok0.m2@y.example>\r\nDATA\r\n"
	body := stormBodyOf(1)
	for _, test := range []struct {
		why     string
		weather stormWeather
		say     []string // each followed by the replies that its lines get
		replies string   // first digits
		want    string   // part of the violation; "" means none
		taken   int
	}{
		{why: "one message", say: []string{"EHLO client.example\r\n", envelope, body, "QUIT\r\n"},
			replies: "2222322", taken: 1},
		{why: "an envelope right after the final dot", say: []string{"EHLO client.example\r\n", envelope, body + "RSET\r\n" + second, stormBodyOf(2)},
			replies: "22223222232", taken: 2},
		{why: "the same without RSET, the first accepted", say: []string{"EHLO client.example\r\n", envelope, body + second, stormBodyOf(2)},
			replies: "2222322232", taken: 2},
		{why: "MAIL in an open transaction", say: []string{"EHLO client.example\r\n", "MAIL FROM:<s.m1@storm.example>\r\n", second},
			replies: "222523", want: "MAIL in an open transaction"},
		{why: "right after EHLO", say: []string{"EHLO client.example\r\n" + envelope}, replies: "22223", want: "after EHLO"},
		{why: "right after DATA", say: []string{"EHLO client.example\r\n", envelope + body}, replies: "222232",
			want: "after DATA", taken: 1},
		{why: "a group without PIPELINING", weather: stormWeather{mode: smtprelay.PipelineOff},
			say: []string{"EHLO client.example\r\n", envelope}, replies: "22223", want: "after MAIL"},
		{why: "overlap although it is disabled", weather: stormWeather{mode: smtprelay.PipelineWithin},
			say: []string{"EHLO client.example\r\n", envelope, body + second}, replies: "222232223", want: "after final dot", taken: 1},
		{why: "one MAIL too many", weather: stormWeather{maxMessages: 1},
			say: []string{"EHLO client.example\r\n", envelope, body, second}, replies: "222232223", want: "MAIL number 2", taken: 1},
		{why: "one RCPT too many", weather: stormWeather{rcptMax: 1},
			say:     []string{"EHLO client.example\r\n", "MAIL FROM:<s.m1@storm.example>\r\nRCPT TO:<ok0.m1@y.example>\r\nRCPT TO:<ok1.m1@y.example>\r\n"},
			replies: "22222", want: "RCPT number 2"},
		{why: "the same without RSET, the first refused", weather: stormWeather{faults: []stormFault{refuse5}, rate: 1000, only: atDot},
			say:     []string{"EHLO client.example\r\n", envelope, body + "MAIL FROM:<s.m2@storm.example>\r\n"},
			replies: "2222355", want: "MAIL in an open transaction"},
		{why: "a body without recipient", weather: stormWeather{goesOn: true}, say: []string{"EHLO client.example\r\n",
			"MAIL FROM:<s.m1@storm.example>\r\nRCPT TO:<gone0.m1@y.example>\r\nDATA\r\n", body}, replies: "222535", want: "a body without recipient"},
		{why: "a truncated body", say: []string{"EHLO client.example\r\n", envelope, strings.Replace(body, "one\r\n", "", 1)},
			replies: "222232", want: "the ledger: ", taken: 1},
		{why: "another's body", say: []string{"EHLO client.example\r\n", envelope, stormBodyOf(2)},
			replies: "222232", want: "the ledger: the body is that of message 2", taken: 1},
		{why: "bare LF", say: []string{"EHLO client.example\r\n", envelope, strings.Replace(body, "one\r\n", "one\n", 1)},
			replies: "222232", want: `ends in "ne\n"`, taken: 1},
		{why: "no dot-stuffing", say: []string{"EHLO client.example\r\n", envelope, strings.Replace(body, "..two", ".two", 1)},
			replies: "222232", want: "not dot-stuffed", taken: 1},
		{why: "after QUIT", say: []string{"EHLO client.example\r\n", "QUIT\r\n", "NOOP\r\n"}, replies: "222", want: "after QUIT"},
		{why: "RSET before MAIL", say: []string{"EHLO client.example\r\n", "RSET\r\n"}, replies: "222", want: "RSET before the first MAIL"},
		{why: "NOOP", say: []string{"EHLO client.example\r\n", "NOOP\r\n"}, replies: "225", want: "unexpected command"},
		{why: "MAIL before EHLO", say: []string{envelope}, replies: "2555", want: "before EHLO"},
		{why: "MAIL without AUTH", weather: stormWeather{auth: "PLAIN"}, say: []string{"EHLO client.example\r\n", "MAIL FROM:<s.m1@storm.example>\r\n"},
			replies: "225", want: "MAIL without AUTH"},
		{why: "a parameter that was not offered", say: []string{"EHLO client.example\r\n", "MAIL FROM:<s.m1@storm.example> RET=FULL\r\n"},
			replies: "222", want: "malformed"},
		{why: "503 to commands that arrive with the dot", weather: stormWeather{habit: refusesOverlap},
			say:     []string{"EHLO client.example\r\n", envelope, body + "RSET\r\n" + second, second, stormBodyOf(2)},
			replies: "22223255552232", taken: 2},
		{why: "no reply to commands that arrive with the dot", weather: stormWeather{habit: discardsOverlap},
			say:     []string{"EHLO client.example\r\n", envelope, body + "RSET\r\n" + second, second, stormBodyOf(2)},
			replies: "2222322232", taken: 2},
		{why: "421 above the connection's limit of messages", weather: stormWeather{mailCap: 1, leaves: leavesOpen},
			say: []string{"EHLO client.example\r\n", envelope, body, "MAIL FROM:<s.m2@storm.example>\r\n"}, replies: "2222324", taken: 1},
	} {
		t.Run(test.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := test.weather
				w.pipelining, w.maxConns, w.quit = true, 1, 5*time.Second
				relay := newStormRelay(1, w)
				conn, err := relay.dial(context.Background(), "tcp", "relay.example:587")
				if err != nil {
					t.Fatal(err)
				}
				var replies []byte
				r := bufio.NewReader(conn)
				hear := func() {
					synctest.Wait()
					conn.SetReadDeadline(time.Now().Add(time.Minute))
					for {
						line, err := r.ReadString('\n')
						if err != nil {
							return
						}
						if line[3] == ' ' {
							replies = append(replies, line[0])
						}
					}
				}
				hear()
				for _, s := range test.say {
					io.WriteString(conn, s)
					hear()
				}
				conn.Close()
				relay.finish()
				if string(replies) != test.replies {
					t.Errorf("the relay answered %s, want %s", replies, test.replies)
				}
				taken := 0
				for _, as := range relay.attempts {
					for _, a := range as {
						if a.taken {
							taken++
						}
						if a.problem != "" {
							relay.violations = append(relay.violations, "the ledger: "+a.problem)
						}
					}
				}
				if taken != test.taken {
					t.Errorf("%d messages are in the ledger, want %d", taken, test.taken)
				}
				found := strings.Join(relay.violations, "\n")
				if test.want == "" && found != "" || !strings.Contains(found, test.want) {
					t.Errorf("found %q, want %q", found, test.want)
				}
				if t.Failed() {
					t.Log("\n" + relay.log.text(0))
				}
			})
		})
	}
}

// TestStormJudgeFinds gives the judge false results: a judge that finds nothing would let every client pass.
func TestStormJudgeFinds(t *testing.T) {
	const to, other = "ok0.m1@y.example", "ok1.m1@y.example"
	yes := smtprelay.Reply{Code: 250, Message: to + " ok"}
	dot := smtprelay.Reply{Code: 250, Message: "Ok: queued as Q1.1"}
	taken := func() *stormAttempt {
		sent := &stormSending{mail: 1}
		sent.dot.Store(2)
		return &stormAttempt{msg: 1, conn: &stormConn{n: 1}, sent: sent, rcpts: []stormRcpt{{to, stormSaid{250, to + " ok"}, true}},
			data: 354, dotRead: true, taken: true, queueID: "Q1.1", final: stormSaid{250, dot.Message}, answered: true}
	}
	accepted := func() *stormTold {
		return &stormTold{receipt: smtprelay.Receipt{Reply: dot, QueueID: "Q1.1", Recipients: []smtprelay.RecipientResult{
			{To: to, Reply: yes, Outcome: smtprelay.Accepted, QueueID: "Q1.1"}}}}
	}
	failed := func(o smtprelay.Outcome, r smtprelay.Reply) *stormTold {
		scope := smtprelay.ScopeRelay
		if r.Code != 0 {
			scope = smtprelay.ScopeMessage
		}
		return &stormTold{err: &smtprelay.Error{Op: smtprelay.OpEnd, Outcome: o, Reply: r, Scope: scope,
			Recipients: []smtprelay.RecipientResult{{To: to, Outcome: o, Reply: r}}}}
	}
	for _, test := range []struct {
		why      string
		told     *stormTold
		attempts []*stormAttempt
		weather  stormWeather
		change   func(told *stormTold, as []*stormAttempt)
		want     string // "" means no fault
	}{
		{why: "accepted and received", told: accepted(), attempts: []*stormAttempt{taken()}},
		{why: "accepted, not received", told: accepted(), want: "the relay has nothing"},
		{why: "accepted, received twice", told: accepted(), attempts: []*stormAttempt{taken(), taken()}, want: "has 2 copies"},
		{why: "accepted and damaged", told: accepted(), attempts: []*stormAttempt{taken()},
			change: func(_ *stormTold, as []*stormAttempt) { as[0].problem = "truncated" }, want: "a wrong message: truncated"},
		{why: "another's queue ID", told: accepted(), attempts: []*stormAttempt{taken()},
			change: func(told *stormTold, _ []*stormAttempt) { told.receipt.Recipients[0].QueueID = "Q1.2" }, want: "queued as Q1.1"},
		{why: "another's final reply", told: accepted(), attempts: []*stormAttempt{taken()},
			change: func(told *stormTold, _ []*stormAttempt) { told.receipt.Reply.Message = "Ok: queued as Q9.9" }, want: "which is the reply to none"},
		{why: "another's reply to RCPT", told: accepted(), attempts: []*stormAttempt{taken()},
			change: func(told *stormTold, _ []*stormAttempt) { told.receipt.Recipients[0].Reply.Message = other + " ok" }, want: "the receipt says"},
		{why: "a receipt without the recipient", told: accepted(), attempts: []*stormAttempt{taken()},
			change: func(told *stormTold, _ []*stormAttempt) { told.receipt.Recipients = nil }, want: "no error, but a receipt"},
		{why: "not accepted, received", told: failed(smtprelay.NotAccepted, smtprelay.Reply{}), attempts: []*stormAttempt{taken()}, want: "the relay has it"},
		{why: "not accepted, never answered", told: failed(smtprelay.NotAccepted, smtprelay.Reply{}), attempts: []*stormAttempt{taken()},
			change: func(_ *stormTold, as []*stormAttempt) { as[0].taken, as[0].answered = false, false }, want: "has not answered the final dot"},
		{why: "not accepted, refused", told: failed(smtprelay.NotAccepted, smtprelay.Reply{Code: 550, Message: "no"}), attempts: []*stormAttempt{taken()},
			weather: stormWeather{faults: []stormFault{refuse5}},
			change:  func(_ *stormTold, as []*stormAttempt) { as[0].taken, as[0].final = false, stormSaid{550, "no"} }},
		{why: "refused in other words", told: failed(smtprelay.NotAccepted, smtprelay.Reply{Code: 550, Message: "never"}),
			weather: stormWeather{faults: []stormFault{refuse5}}, want: "has never said"},
		{why: "unknown, received", told: failed(smtprelay.Unknown, smtprelay.Reply{}), attempts: []*stormAttempt{taken()},
			weather: stormWeather{cuts: 1},
			change:  func(_ *stormTold, as []*stormAttempt) { as[0].answered = false }},
		{why: "unknown, answered", told: failed(smtprelay.Unknown, smtprelay.Reply{}), attempts: []*stormAttempt{taken()},
			want: "although the relay has answered"},
		{why: "unknown, no final dot", told: failed(smtprelay.Unknown, smtprelay.Reply{}), want: "no final dot was written"},
		{why: "sent again after a final dot", told: failed(smtprelay.Unknown, smtprelay.Reply{}), attempts: []*stormAttempt{taken(), taken()},
			weather: stormWeather{cuts: 1},
			change: func(_ *stormTold, as []*stormAttempt) {
				as[0].taken, as[0].answered, as[1].taken, as[1].sent.mail = false, false, false, 3
			}, want: "was sent again"},
		{why: "failed for no reason in calm weather", told: failed(smtprelay.NotAccepted, smtprelay.Reply{}), want: "in calm weather"},
		{why: "sent by a closed client", told: accepted(), attempts: []*stormAttempt{taken()},
			change: func(told *stormTold, _ []*stormAttempt) { told.closed = true }, want: "on a closed client"},
		{why: "late", told: failed(smtprelay.NotAccepted, smtprelay.Reply{}), weather: stormWeather{cuts: 1},
			change: func(told *stormTold, _ []*stormAttempt) {
				told.gaveUp, told.ended = time.Unix(1, 0), time.Unix(600, 0)
			}, want: "after its context had ended"},
	} {
		t.Run(test.why, func(t *testing.T) {
			if test.change != nil {
				test.change(test.told, test.attempts)
			}
			test.told.m = &stormMessage{id: 1, to: []string{to}}
			relay := newStormRelay(1, test.weather)
			relay.attempts[1] = test.attempts
			relay.said[stormSaid{550, "no"}] = true
			judge := stormJudge{p: &stormPlan{weather: test.weather}, relay: relay}
			judge.judge(test.told)
			found := strings.Join(judge.problems, "\n")
			if test.want == "" && found != "" || !strings.Contains(found, test.want) {
				t.Errorf("found %q, want %q", found, test.want)
			}
		})
	}
}
