// AUTH dialogues that go wrong: objections to commands pipelined after AUTH, and challenges. Successful AUTH is in server_test.go
// and tls_test.go.

package smtptest

import (
	"encoding/base64"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func base64Of(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// authRelay returns a plaintext relay that requires AUTH.
func authRelay() *Server {
	s := NewUnstartedServer()
	s.NoTLS = true
	return s
}

// greeted returns a connection that is ready for AUTH.
func greeted(t testing.TB, s *Server) *raw {
	t.Helper()
	r := dial(t, s)
	r.want("220 ")
	if s.tlsConfig != nil {
		r.say("STARTTLS")
		r.want("220 ")
		r.tls(clientTLS(s))
	}
	r.say("EHLO client.test")
	r.want("250-")
	return r
}

// TestObjectionsBehindAuth has each way in which relays object to commands pipelined after AUTH. None objects to AUTH alone.
func TestObjectionsBehindAuth(t *testing.T) {
	led := func(e Event) bool { return e.AuthLed }
	leading := func(e Event) bool { return e.AuthLed && e.N == 1 }
	const hangsUp = "-" // no reply but a close
	tests := []struct {
		why   string
		f     Fault
		wants []string // replies to AUTH, MAIL, RCPT and NOOP in one write
		mail  string   // the reply to the next MAIL; "" if there is none
	}{
		{"503", Fault{At: Auth, Pipelined: true, Reply: "503 5.5.1 no"}, []string{"503 5.5.1 no", "550 ", "502 ", "250 "}, "550 "},
		{"500", Fault{At: Auth, Pipelined: true, Reply: "500 5.5.2 no"}, []string{"500 5.5.2 no", "550 ", "502 ", "250 "}, "550 "},
		{"554", Fault{At: Auth, Pipelined: true, Reply: "554 5.5.0 no"}, []string{"554 5.5.0 no", "550 ", "502 ", "250 "}, "550 "},
		{"535", Fault{At: Auth, Pipelined: true, Reply: "535 5.7.8 no"}, []string{"535 5.7.8 no", "550 ", "502 ", "250 "}, "550 "},
		{"421", Fault{At: Auth, Pipelined: true, Reply: "421 4.7.0 no"}, []string{"421 4.7.0 no", "550 ", "502 ", "250 "}, "550 "},
		{"503 and hangs up", Fault{At: Auth, Pipelined: true, Reply: "503 5.5.1 no", Drop: true}, []string{"503 ", hangsUp}, ""},
		{"421 and hangs up", Fault{At: Auth, Pipelined: true, Reply: "421 4.7.0 no", Drop: true}, []string{"421 ", hangsUp}, ""},
		{"hangs up", Fault{At: Auth, Pipelined: true, Drop: true}, []string{hangsUp}, ""},
		{"235 and hangs up", Fault{At: Auth, Pipelined: true, Reply: "235 2.7.0 yes", Drop: true}, []string{"235 ", hangsUp}, ""},
		{"235 and discards the rest", Fault{At: Auth, Pipelined: true, Discard: true}, []string{"235 "}, "250 "},
		{"503 and discards the rest", Fault{At: Auth, Pipelined: true, Reply: "503 5.5.1 no", Discard: true}, []string{"503 "}, "550 "},
		{"334 to an initial response", Fault{At: Auth, Pipelined: true, Reply: "334 "}, []string{"334 ", "454 ", "502 ", "250 "}, "550 "},
		{"235, then 530 to MAIL", Fault{At: Mail, When: led, Reply: "530 5.7.0 no"}, []string{"235 ", "530 ", "502 ", "250 "}, "530 "},
		{"235, then 503 to MAIL", Fault{At: Mail, When: led, Reply: "503 5.5.1 no"}, []string{"235 ", "503 ", "502 ", "250 "}, "503 "},
		{"235, then 554 to MAIL", Fault{At: Mail, When: led, Reply: "554 5.7.0 no"}, []string{"235 ", "554 ", "502 ", "250 "}, "554 "},
		{"235, then 550 to the leading MAIL", Fault{At: Mail, When: leading, Reply: "550 5.7.1 no"}, []string{"235 ", "550 5.7.1", "502 ", "250 "}, "250 "},
		{"235, then 451 to the leading MAIL", Fault{At: Mail, When: leading, Reply: "451 4.7.0 no"}, []string{"235 ", "451 ", "502 ", "250 "}, "250 "},
	}
	for _, secure := range []bool{false, true} {
		for _, tt := range tests {
			name := tt.why
			if secure {
				name += ", over TLS"
			}
			t.Run(name, func(t *testing.T) {
				s := authRelay()
				s.NoTLS = !secure
				bubble(t, s, func(t *testing.T) {
					f := tt.f
					f.Count = -1
					h := s.Fault(f)
					r := greeted(t, s)
					r.say("AUTH PLAIN "+plain(s), "MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "NOOP")
					for _, want := range tt.wants {
						if want == hangsUp {
							r.closed()
						} else {
							r.want(want)
						}
					}
					if h.Hits() != 1 {
						t.Errorf("%d hits", h.Hits())
					}
					if tt.mail != "" {
						r.silent()
						r.say("RSET", "MAIL FROM:<a@x.example>")
						r.want("250 ", tt.mail)
					}
					hits := h.Hits()
					r = greeted(t, s)
					r.say("AUTH PLAIN " + plain(s))
					r.want("235 ")
					r.send("a@x.example", "b@y.example", "text")
					if h.Hits() != hits {
						t.Error("the relay objects to AUTH alone")
					}
				})
			})
		}
	}
}

// A relay that ignores the initial response sends a challenge, and reads the next line as the response.
func TestInitialResponseIsIgnored(t *testing.T) {
	s := authRelay()
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Auth, Reply: "334 ", Count: -1})
		r := greeted(t, s)
		r.say("AUTH PLAIN "+base64Of("\x00wrong\x00wrong"), plain(s))
		r.want("334 ", "235 ")
		r = greeted(t, s)
		r.say("AUTH LOGIN "+base64Of("wrong"), base64Of(s.Username), base64Of(s.Password))
		r.want("334 ", "334 UGFzc3dvcmQ6", "235 ")
		r = greeted(t, s)
		r.say("AUTH OTHER x")
		r.want("504 ")
		r.say("NOOP")
		r.want("250 ")
	})
}

func TestFaultsOfAuthResponses(t *testing.T) {
	tests := []struct {
		why   string
		f     Fault
		wants []string // replies to both responses of LOGIN
		open  bool
	}{
		{"a refusal", Fault{At: AuthResponse, Reply: "454 4.7.0 not now", Nth: 2}, []string{"334 ", "454 4.7.0 not now"}, true},
		{"another reply for success", Fault{At: AuthResponse, Reply: "235 in", Nth: 2}, []string{"334 ", "235 in"}, true},
		{"drop", Fault{At: AuthResponse, Drop: true, Nth: 2}, []string{"334 "}, false},
		{"success and drop", Fault{At: AuthResponse, Reply: "235 in", Drop: true, Nth: 2}, []string{"334 ", "235 in"}, false},
		{"one more challenge", Fault{At: AuthResponse, Reply: "334 eA=="}, []string{"334 eA==", "334 "}, true},
		{"endless challenges", Fault{At: AuthResponse, Reply: "334 eA==", Count: -1}, []string{"334 eA==", "334 eA=="}, true},
	}
	for _, tt := range tests {
		t.Run(tt.why, func(t *testing.T) {
			s := authRelay()
			bubble(t, s, func(t *testing.T) {
				s.Fault(tt.f)
				r := greeted(t, s)
				r.say("AUTH LOGIN")
				r.want("334 VXNlcm5hbWU6")
				r.say(base64Of(s.Username))
				r.want(tt.wants[0])
				r.say(base64Of(s.Password))
				r.want(tt.wants[1:]...)
				if !tt.open {
					r.closed()
					return
				}
				if last := tt.wants[len(tt.wants)-1]; strings.HasPrefix(last, "334") {
					r.say(base64Of(s.Password))
					if tt.f.Count < 0 {
						r.want("334 eA==")
						return
					}
					r.want("535 ") // the password was read as the user name
				}
				r.say("NOOP")
				r.want("250 ")
			})
		})
	}
}

// A command is Pipelined only if more had arrived when the relay processed it.
func TestPipelinedIsWhatHasArrived(t *testing.T) {
	s := chunking()
	bubble(t, s, func(t *testing.T) {
		var seen []string
		s.Fault(Fault{Count: -1, When: func(e Event) bool {
			if e.Pipelined {
				seen = append(seen, e.Step.String())
			}
			return false
		}})
		r := open(t, s)
		r.say("NOOP")
		r.want("250 ")
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 6", "text", "BDAT 6 LAST", "text")
		r.want("250 ", "250 ", "250 ", "250 ")
		r.say("NOOP", "RSET")
		r.want("250 ", "250 ")
		synctest.Wait()
		if got := strings.Join(seen, " "); got != "MAIL RCPT BDAT NOOP" {
			t.Errorf("pipelined: %s", got)
		}
	})
}

// Discard works at any step, also for what arrives during the fault's Delay.
func TestDiscard(t *testing.T) {
	tests := []struct {
		f     Fault
		says  []string
		late  []string // in a separate write
		wants []string
	}{
		{Fault{At: Noop, Discard: true}, []string{"NOOP", "NOOP"}, nil, []string{"250 "}},
		{Fault{At: Noop, Discard: true, Delay: time.Minute}, []string{"NOOP"}, []string{"NOOP"}, []string{"250 "}},
		{Fault{At: Rcpt, Discard: true, Reply: "550 no"}, []string{"MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "NOOP", "RSET"}, nil, []string{"250 ", "550 no"}},
		{Fault{At: Bdat, Discard: true}, []string{"MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 6 LAST", "text", "NOOP"}, nil, []string{"250 ", "250 ", "250 Ok"}},
		{Fault{At: Body, Discard: true}, []string{"MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 6 LAST", "text", "NOOP"}, nil, []string{"250 ", "250 ", "250 Ok"}},
	}
	for _, tt := range tests {
		t.Run(tt.f.At.String()+" "+tt.f.Reply, func(t *testing.T) {
			s := chunking()
			bubble(t, s, func(t *testing.T) {
				h := s.Fault(tt.f)
				r := open(t, s)
				r.say(tt.says...)
				if tt.late != nil {
					synctest.Wait()
					r.say(tt.late...)
				}
				r.want(tt.wants...)
				r.silent()
				if h.Hits() != 1 {
					t.Errorf("%d hits", h.Hits())
				}
				r.say("RSET")
				r.want("250 ")
				r.send("a@x.example", "b@y.example", "text")
			})
		})
	}
}

// A Discard is not a mere delay: no other fault strikes after it, and it does not strike after another.
func TestDiscardIsABlow(t *testing.T) {
	for _, first := range []bool{true, false} {
		s := plainRelay()
		bubble(t, s, func(t *testing.T) {
			one, other := Fault{At: Noop, Discard: true}, Fault{At: Noop, Reply: "250 other"}
			if !first {
				one, other = other, one
			}
			struck, spared := s.Fault(one), s.Fault(other)
			r := open(t, s)
			r.say("NOOP")
			r.want("250 ")
			if struck.Hits() != 1 || spared.Hits() != 0 {
				t.Errorf("Discard first %t: %d and %d hits", first, struck.Hits(), spared.Hits())
			}
		})
	}
}

// Over TLS, data in a separate record counts as arrived too.
func TestPipelinedInARecordOfItsOwn(t *testing.T) {
	s := NewUnstartedServer()
	bubble(t, s, func(t *testing.T) {
		r := greeted(t, s)
		s.Fault(Fault{At: Noop, Delay: time.Minute})
		s.Fault(Fault{At: Auth, Pipelined: true, Reply: "503 5.5.1 no"})
		r.say("NOOP")
		r.say("AUTH PLAIN " + plain(s))
		r.say("MAIL FROM:<a@x.example>")
		r.want("250 ", "503 5.5.1 no", "550 ")
	})
}
