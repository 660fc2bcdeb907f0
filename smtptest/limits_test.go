package smtptest

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
)

func TestEleventhConnectionIsRefused(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		var conns []*raw
		for range 10 {
			r := dial(t, s)
			r.want("220 ")
			conns = append(conns, r)
		}
		r := dial(t, s)
		r.want("421 4.7.0 Too many concurrent SMTP connections")
		r.closed()
		if s.Stats().Open != 10 || s.Stats().MaxOpen != 11 || s.Stats().Refused != 1 || !s.Conns()[10].Refused {
			t.Errorf("%d open, %d at most, %d refused, %+v", s.Stats().Open, s.Stats().MaxOpen, s.Stats().Refused, s.Conns()[10])
		}
		conns[0].say("QUIT")
		conns[0].want("221 ")
		conns[0].closed()
		// Once the client has seen the close the slot is free, however far the relay's goroutine is.
		r = dial(t, s)
		r.want("220 ")
		for _, r := range append(conns[1:], r) {
			r.Close()
		}
		synctest.Wait()
		if s.Stats().Open != 0 {
			t.Errorf("%d open after all clients have closed", s.Stats().Open)
		}
	})
}

func TestSlotIsFreeWhenTheClientSeesTheClose(t *testing.T) {
	s := plainRelay()
	s.MaxConns = 1
	start(t, s)
	for range 200 {
		r := dial(t, s)
		r.want("220 ")
		r.say("QUIT")
		r.want("221 ")
		r.closed()
	}
	if s.Stats().Refused != 0 || s.Stats().MaxOpen != 1 {
		t.Errorf("%d refused, %d open at most", s.Stats().Refused, s.Stats().MaxOpen)
	}
}

func TestHundredAndFirstMessageIsRefused(t *testing.T) {
	s := plainRelay()
	s.Reject = map[string]string{"refused@x.example": "550 5.7.1 not you"}
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("MAIL FROM:<refused@x.example>") // counts too
		r.want("550 ")
		for i := range 99 {
			r.send("a@x.example", "b@y.example", fmt.Sprint(i))
		}
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("421 4.7.0 Too many messages in this connection")
		r.closed()
		st := s.Conns()[0]
		if s.Stats().Refused != 1 || s.Stats().Accepted != 99 || st.Mails != 101 || st.Open {
			t.Errorf("%d refused, %d accepted, %+v", s.Stats().Refused, s.Stats().Accepted, st)
		}
	})
}

func TestNegativeLimitsAreNone(t *testing.T) {
	s := plainRelay()
	s.MaxConns, s.MaxMessages, s.MaxRecipients, s.MaxSize = -1, -1, -1, -1
	bubble(t, s, func(t *testing.T) {
		for range 20 {
			dial(t, s).want("220 ")
		}
		r := dial(t, s)
		r.want("220 ")
		r.say("EHLO client.test")
		if reply, _ := r.reply(); strings.Contains(reply, "SIZE") {
			t.Errorf("SIZE announced: %q", reply)
		}
		for range 150 {
			r.send("a@x.example", "b@y.example", "text")
		}
		r.say("MAIL FROM:<a@x.example> SIZE=99999999999")
		r.want("250 ")
		for range 1500 {
			r.say("RCPT TO:<b@y.example>")
			r.want("250 ")
		}
		r.say("DATA")
		r.want("354 ")
		r.say("text", ".")
		r.want("250 ")
		if m := s.Messages()[150]; len(m.To) != 1500 || m.MailOptions.Size != 99999999999 {
			t.Errorf("%d recipients, SIZE=%d", len(m.To), m.MailOptions.Size)
		}
	})
}

func TestRecipientsAndSizeAreLimited(t *testing.T) {
	s := plainRelay()
	s.MaxRecipients, s.MaxSize = 2, 10
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example> SIZE=11")
		r.want("552 ")
		r.say("MAIL FROM:<a@x.example> SIZE=5000000000")
		r.want("552 ")
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "RCPT TO:<c@y.example>", "RCPT TO:<d@y.example>", "DATA")
		r.want("250 ", "250 ", "250 ", "452 4.5.3", "354 ")
		r.say("too long", ".", "MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 Ok", "250 ", "250 ", "354 ") // "too long\r\n" is ten octets
		r.say("too long!", ".", "QUIT")
		r.want("552 ", "221 ")
		r.closed()
		if s.Stats().Accepted != 1 || len(s.Messages()[0].To) != 2 {
			t.Errorf("%+v", s.Messages())
		}
	})
}

func TestRejectedAddresses(t *testing.T) {
	s := plainRelay()
	s.Reject = map[string]string{"gone@y.example": "550 5.1.1 no such user", "slow@y.example": "451-4.7.1 come\n451 4.7.1 again"}
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<Gone@y.example>", "RCPT TO:<slow@y.example>", "DATA")
		r.want("250 ", "550 5.1.1 no such user", "451-4.7.1 come\n451 4.7.1 again", "502 ")
		r.say("RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "354 ")
		r.say(".")
		r.want("250 ")
		if m := s.Messages()[0]; len(m.To) != 1 || m.To[0] != "b@y.example" {
			t.Errorf("recipients %q", m.To)
		}
	})
}

func TestExtensions(t *testing.T) {
	const envelope = "MAIL FROM:<a@x.example> SMTPUTF8 RET=HDRS ENVID=x"
	t.Run("not offered", func(t *testing.T) {
		s := plainRelay()
		bubble(t, s, func(t *testing.T) {
			r := open(t, s)
			r.say(envelope)
			r.want("504 ")
		})
	})
	t.Run("offered", func(t *testing.T) {
		s := plainRelay()
		s.Extensions = []string{"SMTPUTF8", "DSN", "LIMITS MAILMAX=5 RCPTMAX=2"}
		s.Without = []string{"8bitmime", "SIZE"}
		bubble(t, s, func(t *testing.T) {
			r := dial(t, s)
			r.want("220 ")
			r.say("EHLO client.test")
			r.want("250-smtp.test\n250-PIPELINING\n250-SMTPUTF8\n250-DSN\n250 LIMITS MAILMAX=5 RCPTMAX=2")
			r.say(envelope, "RCPT TO:<b@y.example> NOTIFY=FAILURE", "DATA")
			r.want("250 ", "250 ", "354 ")
			r.say(".")
			r.want("250 ")
			m := s.Messages()[0]
			if !m.MailOptions.UTF8 || m.MailOptions.EnvelopeID != "x" || len(m.RcptOptions[0].Notify) != 1 {
				t.Errorf("%+v", m)
			}
		})
	})
}

func TestUrgencyIsAParameterOfMailOnly(t *testing.T) {
	s := plainRelay()
	s.Extensions = []string{"DELIVERBY", "MT-PRIORITY"}
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say(`MAIL FROM:<" BY=0;R "@x.example> BY=120;R MT-PRIORITY=-3`, "RCPT TO:<b@y.example> BY=120;R", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "555 5.5.4", "250 ", "354 ")
		r.say(".")
		r.want("250 ")
		o := s.Messages()[0].MailOptions
		if o.DeliverBy == nil || *o.DeliverBy != (smtprelay.DeliverBy{Time: 2 * time.Minute, Mode: smtprelay.DeliverByReturn}) || o.Priority == nil || *o.Priority != -3 {
			t.Errorf("%+v", o)
		}
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "250 ", "354 ")
		r.say(".")
		r.want("250 ")
		if o := s.Messages()[1].MailOptions; o.DeliverBy != nil || o.Priority != nil {
			t.Errorf("the next message: %+v", o)
		}
	})
}

func TestUrgencyIsParsedAsItsRFCsSay(t *testing.T) {
	for _, tt := range []struct {
		param string
		by    smtprelay.DeliverBy // the zero value means that the parameter is refused
	}{
		{"BY=-60;N", smtprelay.DeliverBy{Time: -time.Minute, Mode: smtprelay.DeliverByNotify}},
		{"BY=+60;NT", smtprelay.DeliverBy{Time: time.Minute, Mode: smtprelay.DeliverByNotify, Trace: true}},
		{"by=999999999;rt", smtprelay.DeliverBy{Time: 999_999_999 * time.Second, Mode: smtprelay.DeliverByReturn, Trace: true}},
		{"BY=0;R", smtprelay.DeliverBy{}},
		{"BY=-1;R", smtprelay.DeliverBy{}},
		{"BY=1000000000;N", smtprelay.DeliverBy{}},
		{"BY=1", smtprelay.DeliverBy{}},
		{"BY=1;X", smtprelay.DeliverBy{}},
		{"BY", smtprelay.DeliverBy{}},
		{"MT-PRIORITY=10", smtprelay.DeliverBy{}},
		{"MT-PRIORITY=-0", smtprelay.DeliverBy{}},
		{"MT-PRIORITY=", smtprelay.DeliverBy{}},
	} {
		t.Run(tt.param, func(t *testing.T) {
			s := plainRelay()
			s.Extensions = []string{"DELIVERBY", "MT-PRIORITY"}
			bubble(t, s, func(t *testing.T) {
				r := open(t, s)
				r.say("MAIL FROM:<a@x.example> " + tt.param)
				if tt.by == (smtprelay.DeliverBy{}) {
					r.want("501 5.5.4 Malformed parameter " + tt.param)
					return
				}
				r.want("250 ")
				r.say("RCPT TO:<b@y.example>", "DATA")
				r.want("250 ", "354 ")
				r.say(".")
				r.want("250 ")
				if by := s.Messages()[0].MailOptions.DeliverBy; by == nil || *by != tt.by {
					t.Errorf("got %+v, want %+v", by, tt.by)
				}
			})
		})
	}
}

func TestClientsThatDoNotWaitAreDisconnected(t *testing.T) {
	tests := []struct {
		why  string
		set  func(*Server)
		talk func(*raw)
	}{
		{"commands right after EHLO", nil, func(r *raw) {
			r.want("220 ")
			r.say("EHLO client.test", "MAIL FROM:<a@x.example>")
			r.want("554 5.5.0")
		}},
		{"the body right after DATA", nil, func(r *raw) {
			r.want("220 ")
			r.say("EHLO client.test")
			r.want("250-")
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA", "text", ".")
			r.want("250 ", "250 ", "554 5.5.0")
		}},
		{"pipelining that was not offered", func(s *Server) { s.Without = []string{"PIPELINING"} }, func(r *raw) {
			r.want("220 ")
			r.say("EHLO client.test")
			r.want("250-")
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>")
			r.want("500 5.5.1 Invalid command: Pipelining not supported")
		}},
		{"QUIT right after the final dot without PIPELINING", func(s *Server) { s.Without = []string{"PIPELINING"} }, func(r *raw) {
			r.want("220 ")
			for _, line := range []string{"EHLO client.test", "MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA"} {
				r.say(line)
				r.reply()
			}
			r.say("text", ".", "QUIT")
			r.want("500 5.5.1 Invalid command: Pipelining not supported")
		}},
		{"a chunk that was not asked for", nil, func(r *raw) {
			r.want("220 ")
			r.say("BDAT 4 LAST")
			r.want("500 ")
		}},
	}
	for _, tt := range tests {
		t.Run(tt.why, func(t *testing.T) {
			s := plainRelay()
			if tt.set != nil {
				tt.set(s)
			}
			bubble(t, s, func(t *testing.T) {
				r := dial(t, s)
				tt.talk(r)
				r.closed()
				if s.Stats().Accepted != 0 {
					t.Error("a message was accepted")
				}
			})
		})
	}
	t.Run("speaking before the greeting", func(t *testing.T) {
		s := plainRelay()
		bubble(t, s, func(t *testing.T) {
			s.Fault(Fault{At: Connect, Delay: 1})
			r := dial(t, s)
			r.say("EHLO client.test")
			r.want("421 4.5.0 You talk too soon")
			r.closed()
		})
	})
}

func TestSyntaxErrorsDoNotEndTheConnection(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		for _, line := range []string{"", "X", "FROB", "MAILFROM:<a@x.example>", "MAIL FROM:a b", "RSET\x00", "NOOP \rRSET", "DATA x"} {
			r.say(line)
			if reply, err := r.reply(); err != nil || reply[0] != '5' {
				t.Errorf("%q: %q, %v", line, reply, err)
			}
		}
		r.say("VRFY a", "HELP", "NOOP", "rset ", "HELO client.test")
		r.want("252 ", "502 ", "250 ", "250 ", "250 smtp.test")
		r.say("NOOP " + strings.Repeat("x", readBuffer))
		r.want("500 5.5.2 Line too long")
		r.closed()
		if s.Stats().Commands["NOOP"] != 2 || s.Stats().Commands["RSET"] != 1 || s.Conns()[0].Commands[""] != 5 {
			t.Errorf("%v", s.Conns()[0].Commands)
		}
	})
}
