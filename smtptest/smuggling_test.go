// Relays that turn one message into another: a refused chunk read as commands, a transaction that survives RSET, a truncated
// message taken as complete. Chunks on a relay that behaves well are in bdat_test.go.

package smtptest

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const (
	smuggledWithSender = "Subject: a question\r\n\r\nhello\r\nMAIL FROM:<ceo@x.example>\r\nRCPT TO:<victim@y.example>\r\nDATA\r\nSubject: smuggled\r\n\r\nSend money.\r\n.\r\n"
	smuggled           = "Subject: a question\r\n\r\nhello\r\nRCPT TO:<victim@y.example>\r\nDATA\r\nSubject: smuggled\r\n\r\nSend money.\r\n.\r\n"
)

// TestRefusedChunkReadAsCommands sends an envelope, a chunk with a smuggled message, and NOOP in one write.
func TestRefusedChunkReadAsCommands(t *testing.T) {
	const unknown = "500 5.5.2 " // to a line of text
	refuse := Fault{At: Bdat, Reply: "451 no"}
	tests := []struct {
		why      string
		f        Fault
		chunking bool
		envelope []string
		chunk    string
		wants    []string // replies after those to the envelope, up to the one to NOOP
		from     string   // of the smuggled message; "" if there is none
	}{
		{"no recipient accepted", Fault{}, true, []string{"MAIL FROM:<a@x.example>", "RCPT TO:<no@y.example>"}, smuggled,
			[]string{"503 ", unknown, unknown, unknown, "250 ", "354 ", "250 Ok"}, "a@x.example"},
		{"no sender accepted", Fault{}, true, []string{"MAIL FROM:<no@y.example>"}, smuggledWithSender,
			[]string{"503 ", unknown, unknown, unknown, "250 ", "250 ", "354 ", "250 Ok"}, "ceo@x.example"},
		{"no transaction", Fault{}, true, nil, smuggledWithSender,
			[]string{"503 ", unknown, unknown, unknown, "250 ", "250 ", "354 ", "250 Ok"}, "ceo@x.example"},
		{"no transaction, no smuggled sender", Fault{}, true, nil, smuggled,
			[]string{"503 ", unknown, unknown, unknown, "502 ", "502 ", unknown, unknown, unknown, unknown}, ""},
		{"a fault's refusal", refuse, true, []string{"MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>"}, smuggled,
			[]string{"451 no", unknown, unknown, unknown, "250 ", "354 ", "250 Ok"}, "a@x.example"},
		{"announced but not implemented", Fault{}, false, []string{"MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>"}, smuggled,
			[]string{"500 5.5.1", unknown, unknown, unknown, "250 ", "354 ", "250 Ok"}, "a@x.example"},
		{"a probe", Fault{}, true, nil, "XCHUNK\r\n", []string{"503 ", unknown}, ""},
	}
	for _, secure := range []bool{false, true} {
		for _, tt := range tests {
			name := tt.why
			if secure {
				name += ", over TLS"
			}
			t.Run(name, func(t *testing.T) {
				s := plainRelay()
				s.NoTLS, s.KeepRefusedChunks, s.Chunking = !secure, true, tt.chunking
				if !tt.chunking {
					s.Extensions = []string{"CHUNKING"}
				}
				s.Reject = map[string]string{"no@y.example": "550 no"}
				bubble(t, s, func(t *testing.T) {
					if tt.f.At != 0 {
						s.Fault(tt.f)
					}
					r := open(t, s)
					r.say(append(tt.envelope, fmt.Sprintf("BDAT %d LAST\r\n%sNOOP", len(tt.chunk), tt.chunk))...)
					for range tt.envelope {
						r.want("")
					}
					r.want(tt.wants...)
					r.want("250 2.0.0 I have")
					r.silent()
					switch got := s.Messages(); {
					case tt.from == "" && len(got) > 0:
						t.Errorf("%+v", got)
					case tt.from == "":
					case len(got) != 1 || got[0].From != tt.from || got[0].To[len(got[0].To)-1] != "victim@y.example" || got[0].Chunked:
						t.Errorf("%+v", got)
					}
				})
			})
		}
	}
}

// A chunk that arrives in several pieces is read as commands too, wherever it is split.
func TestRefusedChunkInPiecesReadAsCommands(t *testing.T) {
	s := plainRelay()
	s.Chunking, s.KeepRefusedChunks = true, true
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Noop, Delay: time.Minute, Count: -1})
		begin, rest, _ := strings.Cut(smuggledWithSender, "DATA\r\n")
		r := open(t, s)
		r.say("NOOP")
		fmt.Fprintf(r, "BDAT %d LAST\r\n%sNOOP\r\nDATA\r\n", len(smuggledWithSender)+6, begin)
		synctest.Wait() // the relay has read the first NOOP and no more
		time.Sleep(90 * time.Second)
		io.WriteString(r, rest) // while the relay executes the second
		r.want("250 ", "503 ", "500 ", "500 ", "500 ", "250 ", "250 ", "250 ", "354 ", "250 Ok")
	})
}

// Without AUTH the smuggled envelope is refused like any other.
func TestRefusedChunkWithoutAuth(t *testing.T) {
	s := authRelay()
	s.Chunking, s.KeepRefusedChunks = true, true
	bubble(t, s, func(t *testing.T) {
		r := greeted(t, s)
		r.say("AUTH PLAIN "+base64Of("\x00wrong\x00wrong"), "MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 14 LAST", "NOOP", "QUIT", "", "NOOP")
		r.want("535 ", "550 ", "502 ", "503 ", "250 ", "221 ")
		r.closed()
	})
}

// A message does not continue without a refused chunk, whatever happens to the chunk's octets.
func TestRefusedChunkEndsItsMessage(t *testing.T) {
	s := chunking()
	s.KeepRefusedChunks = true
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Bdat, Nth: 2, Reply: "451 no"})
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 6", "text", "BDAT 6", "NOOP", "BDAT 0 LAST")
		r.want("250 ", "250 ", "250 ", "451 no", "250 2.0.0 I have", "503 ")
		if s.Stats().Accepted != 0 {
			t.Errorf("%d accepted", s.Stats().Accepted)
		}
	})
}

func TestChunkRefusedBehindADotReadAsCommands(t *testing.T) {
	s := chunking()
	s.Behind, s.KeepRefusedChunks = HabitRefuse, true
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 6 LAST", "text", "BDAT 6 LAST", "RSET")
		r.want("250 ", "250 ", "250 Ok", "503 ", "503 ")
		r.silent()
	})
}

// A chunk out of order gets one error, its octets get none, and the next command gets its own reply.
func TestRefusedChunkIsDiscarded(t *testing.T) {
	for _, behind := range []string{"NOOP", "RSET"} {
		for _, hello := range []bool{false, true} {
			s := chunking()
			bubble(t, s, func(t *testing.T) {
				r := dial(t, s)
				r.want("220 ")
				if hello {
					r.say("EHLO client.test")
					r.want("250-")
				}
				r.say("BDAT 8", "XCHUNK", behind)
				r.want("503 ", "250 ")
				r.silent()
			})
		}
	}
}

func TestEnvelopeKeptThroughRset(t *testing.T) {
	for _, chunked := range []bool{false, true} {
		s := chunking()
		s.KeepEnvelopeOnRset = true
		bubble(t, s, func(t *testing.T) {
			r := open(t, s)
			r.say("RSET", "MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "RSET", "MAIL FROM:<c@x.example>", "RCPT TO:<d@y.example>")
			r.want("250 ", "250 ", "250 ", "250 ", "503 ", "250 ")
			if chunked {
				r.say("BDAT 6", "lost", "RSET", "BDAT 6 LAST", "text") // RSET ends the message, but keeps its envelope
				r.want("250 ", "250 ", "250 Ok")
			} else {
				r.say("DATA")
				r.want("354 ")
				r.say("text", ".")
				r.want("250 Ok")
			}
			m := s.Messages()[0]
			if m.From != "a@x.example" || strings.Join(m.To, " ") != "b@y.example d@y.example" || string(m.Body) != "text\r\n" {
				t.Errorf("%+v", m)
			}
			r.send("c@x.example", "d@y.example", "text") // the message has ended the transaction
		})
	}
}

func TestRsetEndsTheTransaction(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "MAIL FROM:<c@x.example>", "RSET", "RCPT TO:<b@y.example>")
		r.want("250 ", "250 ", "503 5.5.1 Sender already given", "250 ", "502 ")
	})
}

// TestConnectionThatEndsBeforeTheEmptyLastChunk cuts "BDAT 0 LAST", sent after the whole body, at each octet.
func TestConnectionThatEndsBeforeTheEmptyLastChunk(t *testing.T) {
	const last = "BDAT 0 LAST\r\n"
	envelope := "MAIL FROM:<a@x.example>\r\nRCPT TO:<b@y.example>\r\nBDAT 6\r\ntext\r\n"
	for n := range len(last) + 1 {
		for _, rst := range []bool{false, true} {
			want := 0
			if n == len(last) {
				want = 1
			}
			t.Run(fmt.Sprintf("%d octets, reset %t", n, rst), func(t *testing.T) {
				s := chunking()
				bubble(t, s, func(t *testing.T) {
					r := open(t, s)
					io.WriteString(r, envelope+last[:n])
					synctest.Wait() // a reset destroys unread input
					if rst {
						r.pipe.Reset()
					} else {
						r.Close()
					}
					synctest.Wait()
					if s.Stats().Accepted != want || s.Stats().Open != 0 {
						t.Errorf("%d accepted, %d open", s.Stats().Accepted, s.Stats().Open)
					}
				})
			})
			t.Run(fmt.Sprintf("%d octets, reset %t, over a socket", n, rst), func(t *testing.T) {
				s := start(t, chunking())
				r := open(t, s)
				io.WriteString(r, envelope+last[:n])
				r.want("250 ", "250 ", "250 ")
				if n == len(last) {
					r.want("250 Ok")
				}
				tc := r.Conn.(*net.TCPConn)
				if rst {
					tc.SetLinger(0)
					tc.Close()
				} else {
					tc.CloseWrite()
					io.Copy(io.Discard, r.br)
					tc.Close()
				}
				s.Close() // waits for the relay's side to end
				if s.Stats().Accepted != want {
					t.Errorf("%d accepted", s.Stats().Accepted)
				}
			})
		}
	}
}

// Over TLS too, an empty last chunk whose command line is cut does not complete the message.
func TestTLSConnectionThatEndsBeforeTheEmptyLastChunk(t *testing.T) {
	s := chunking()
	s.NoTLS = false
	bubble(t, s, func(t *testing.T) {
		for _, closes := range []func(*raw, net.Conn){
			func(r *raw, _ net.Conn) { r.Conn.Close() },    // close_notify
			func(_ *raw, below net.Conn) { below.Close() }, // FIN alone
		} {
			r := dial(t, s)
			below := r.Conn
			r.ready(s)
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 6", "text")
			io.WriteString(r, "BDAT 0 LAST")
			r.want("250 ", "250 ", "250 ")
			closes(r, below)
			synctest.Wait()
			if s.Stats().Accepted != 0 || s.Stats().Open != 0 {
				t.Errorf("%d accepted, %d open", s.Stats().Accepted, s.Stats().Open)
			}
		}
	})
}
