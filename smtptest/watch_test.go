// A long-running relay: its own listener, limited memory, and callbacks.
package smtptest

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
)

// deliver sends a message over r and waits for the reply.
func deliver(r *raw, text string) {
	r.t.Helper()
	r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
	r.want("250 ", "250 ", "354 ")
	r.say(text, ".")
	r.want("250 ")
}

func TestRemembersNoMoreThanItKeepsAndCountsAll(t *testing.T) {
	for _, keep := range []int{-1, 2} {
		t.Run(fmt.Sprint(keep), func(t *testing.T) {
			s := plainRelay()
			s.Keep = keep
			var told []string
			s.OnMessage = func(m Message) { told = append(told, string(m.Body)) }
			bubble(t, s, func(t *testing.T) {
				for n := range 5 {
					r := dial(t, s)
					r.want("220 ")
					r.say("EHLO client.test")
					r.want("250-")
					deliver(r, fmt.Sprintf("Subject: %d\r\n", n/2)) // 0 0 1 1 2
					r.say("QUIT")
					r.want("221 ")
					r.Close()
					synctest.Wait()
				}
				if err := s.Wait(t.Context(), 5); err != nil {
					t.Error(err)
				}
				st := s.Stats()
				if st.Conns != 5 || st.Accepted != 5 || st.Mails != 5 || st.Commands["RCPT"] != 5 || st.Turns != 20 || st.Open != 0 {
					t.Errorf("stats %+v", st)
				}
				kept := max(0, keep)
				if st.Duplicates != kept || len(s.Messages()) != kept || len(s.Conns()) != kept || len(s.conns) != kept || len(s.seen) != kept {
					t.Errorf("%d duplicates, %d messages, %d connections, %d hashes", st.Duplicates, len(s.Messages()), len(s.Conns()), len(s.seen))
				}
				if kept > 0 && (s.Conns()[1].Conn != 5 || string(s.Messages()[1].Body) != "Subject: 2\r\n\r\n") {
					t.Errorf("the latest are not kept: %+v %q", s.Conns()[1], s.Messages()[1].Body)
				}
			})
			if len(told) != 5 || told[4] != "Subject: 2\r\n\r\n" {
				t.Errorf("OnMessage was given %q", told)
			}
		})
	}
}

func TestOnLineGetsTheTranscriptWithItsTurns(t *testing.T) {
	s := plainRelay()
	var log strings.Builder
	s.Log = &log
	var again strings.Builder
	var turns []int
	s.OnLine = func(l Line) {
		fmt.Fprintf(&again, "%s%d: %s\n", l.Who, l.Conn, l.Text)
		turns = append(turns, l.Turn)
		if l.TLS || l.Time.IsZero() {
			t.Errorf("line %+v", l)
		}
	}
	bubble(t, s, func(t *testing.T) {
		r := dial(t, s)
		r.want("220 ")
		r.say("NOOP", "NOOP") // one turn
		r.want("250 ", "250 ")
		r.say("QUIT")
		r.want("221 ")
		r.Close()
	})
	if log.String() != again.String() {
		t.Errorf("Log has\n%sand OnLine\n%s", &log, &again)
	}
	if want := "[0 0 1 1 1 1 2 2 2]"; fmt.Sprint(turns) != want { // opened, greeting, two NOOP, QUIT, closed
		t.Errorf("turns %v, want %s\n%s", turns, want, &log)
	}
}

func TestListenerOfTheCallerIsServedAndClosed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := NewUnstartedServer()
	s.Listener = l.(*net.TCPListener)
	s.Start()
	if s.Addr() != l.Addr().String() {
		t.Errorf("the relay is at %s, its listener at %s", s.Addr(), l.Addr())
	}
	r := dial(t, s)
	r.want("220 ")
	s.Close()
	if _, err := l.Accept(); err == nil {
		t.Error("the listener is open after Close")
	}
}
