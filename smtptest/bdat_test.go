package smtptest

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
)

// chunking returns a relay that offers CHUNKING.
func chunking() *Server {
	s := plainRelay()
	s.Chunking = true
	return s
}

func TestChunks(t *testing.T) {
	s := chunking()
	bubble(t, s, func(t *testing.T) {
		r := dial(t, s)
		r.want("220 ")
		r.say("EHLO client.test")
		r.want("250-smtp.test\n250-8BITMIME\n250-PIPELINING\n250-SIZE 31457280\n250 CHUNKING")
		begin := "MAIL FROM:<a@x.example>\r\nRCPT TO:<b@y.example>\r\n"
		big := strings.Repeat(".\r\n", 100_000) // larger than any buffer; dots have no meaning
		fmt.Fprintf(r, "%sBDAT 2\r\nabBDAT 0\r\nBDAT %d\r\n%sBDAT 1 LAST\r\nc", begin, len(big), big)
		r.want("250 ", "250 ", "250 ", "250 ", "250 ", "250 Ok")
		fmt.Fprintf(r, "%sBDAT 3\r\n.\r\nBDAT 0 LAST\r\n%sBDAT 0 LAST\r\n%sbdat 1 last\r\nxQUIT\r\n", begin, begin, begin)
		r.want("250 ", "250 ", "250 ", "250 Ok", "250 ", "250 ", "250 Ok", "250 ", "250 ", "250 Ok", "221 ")
		r.closed()
		for i, want := range []string{"ab" + big + "c", ".\r\n", "", "x"} {
			if m := s.Messages()[i]; string(m.Body) != want || !m.Chunked || m.Nth != i+1 {
				t.Errorf("message %d: %.20q", i, m.Body)
			}
		}
		if s.Stats().Overlapped != 2 {
			t.Errorf("%d overlapped", s.Stats().Overlapped)
		}
	})
}

func TestChunksOutOfOrder(t *testing.T) {
	s := chunking()
	s.MaxSize = 10
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("BDAT 6 LAST", "text", "MAIL FROM:<a@x.example>", "BDAT 6 LAST", "text", "RCPT TO:<b@y.example>", "BDAT 6", "text", "MAIL FROM:<a@x.example>")
		r.want("503 ", "250 ", "503 ", "250 ", "250 ", "503 ")
		r.say("BDAT 6", "text", "BDAT 6 LAST", "text", "RSET") // twelve octets are too many; the next chunk has no transaction
		r.want("552 ", "503 ", "250 ")
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 6", "text", "RSET") // the client abandons the message
		r.want("250 ", "250 ", "250 ", "250 ")
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 5 LAST", "new")
		r.want("250 ", "250 ", "250 Ok")
		if got := s.Messages(); len(got) != 1 || string(got[0].Body) != "new\r\n" {
			t.Errorf("%+v", got)
		}
		r.say("BDAT x")
		r.want("500 ")
		r.closed()
	})
}

// TestChunkThatIsCutShort shows what go-smtp's server and others do to clients that abandon a chunk with FIN.
func TestChunkThatIsCutShort(t *testing.T) {
	tests := []struct {
		why      string
		says     []string
		give     func(*raw)
		accepted int
	}{
		{"the last by FIN", []string{"BDAT 100 LAST", "text"}, func(r *raw) { r.Close() }, 1},
		{"the last by RST", []string{"BDAT 100 LAST", "text"}, func(r *raw) { r.pipe.Reset() }, 0},
		{"another by FIN", []string{"BDAT 100", "text"}, func(r *raw) { r.Close() }, 0},
	}
	for _, tt := range tests {
		t.Run(tt.why, func(t *testing.T) {
			s := chunking()
			bubble(t, s, func(t *testing.T) {
				r := open(t, s)
				r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>")
				r.want("250 ", "250 ")
				r.say(tt.says...)
				synctest.Wait()
				tt.give(r)
				synctest.Wait()
				if s.Stats().Accepted != tt.accepted || s.Stats().Open != 0 {
					t.Errorf("%d accepted, %d open", s.Stats().Accepted, s.Stats().Open)
				}
			})
		})
	}
}

func TestFaultsOfChunks(t *testing.T) {
	tests := []struct {
		f     Fault
		says  string
		wants []string
	}{
		{Fault{At: Bdat, Reply: "451 no"}, "BDAT 3\r\nabcNOOP\r\n", []string{"451 no", "250 2.0.0 I have"}},
		{Fault{At: Bdat, Reply: "451 no"}, "BDAT 3\r\nabcBDAT 1 LAST\r\nd", []string{"451 no", "503 "}},
		{Fault{At: Bdat, Reply: "250 yes"}, "BDAT 3\r\nabcBDAT 1 LAST\r\nd", []string{"250 yes", "250 Ok"}},
		{Fault{At: Body, AfterBytes: 2, Reply: "452 full"}, "BDAT 3\r\nabcBDAT 1 LAST\r\nd", []string{"452 full", "554 "}},
		{Fault{At: Body, AfterBytes: 4, Reply: "452 full"}, "BDAT 3\r\nabcBDAT 2 LAST\r\ndeNOOP\r\n", []string{"250 ", "452 full", "250 2.0.0 I have"}},
		{Fault{At: FinalDot, Reply: "451 no"}, "BDAT 3\r\nabcBDAT 1 LAST\r\ndNOOP\r\n", []string{"250 ", "451 no", "250 2.0.0 I have"}},
		{Fault{At: FinalDot, Reply: "451 no"}, "BDAT 0 LAST\r\nNOOP\r\n", []string{"451 no", "250 2.0.0 I have"}},
	}
	for _, tt := range tests {
		t.Run(tt.f.At.String()+" "+tt.f.Reply, func(t *testing.T) {
			s := chunking()
			bubble(t, s, func(t *testing.T) {
				h := s.Fault(tt.f)
				r := open(t, s)
				r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>")
				r.want("250 ", "250 ")
				fmt.Fprint(r, tt.says)
				r.want(tt.wants...)
				r.silent()
				want := 0
				if positive(tt.f.Reply) {
					want = 1
				}
				if h.Hits() != 1 || s.Stats().Accepted != want {
					t.Errorf("%d hits, %d accepted", h.Hits(), s.Stats().Accepted)
				}
			})
		})
	}
}
