package hostile

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay"
)

// Relays that follow the protocol, but send one extra reply somewhere. Each later reply is taken for the reply to the command
// before, until something reveals it. Here something does: a reply that its command cannot have, a 421 with more after it, or two
// final replies that disagree.

// slip is one extra reply.
type slip struct {
	verb   string // the command whose reply it is next to
	nth    int    // on the first connection
	before bool   // before that reply, else after it
	extra  string
}

// slipping is a relay that slips once. It records what it has accepted.
type slipping struct {
	slip
	mu    sync.Mutex
	mails map[string]int // accepted, by recipient
	conns int
}

// serve serves one connection. Replies are flushed when there is no more input, as by many relays.
func (s *slipping) serve(nc net.Conn) {
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(giveUp))
	in, out := bufio.NewReader(nc), bufio.NewWriter(nc)
	s.mu.Lock()
	s.conns++
	slips := s.conns == 1
	s.mu.Unlock()
	seen := make(map[string]int)
	say := func(verb, text string) {
		extra := ""
		if seen[verb]++; slips && verb == s.verb && seen[verb] == s.nth {
			extra = s.extra + "\r\n"
		}
		if s.before {
			text = extra + text + "\r\n"
		} else {
			text += "\r\n" + extra
		}
		out.WriteString(text)
	}
	var from string
	var to []string
	end := func(verb string) {
		if strings.HasPrefix(from, "refused") {
			say(verb, "452 4.3.1 no room")
		} else {
			s.mu.Lock()
			for _, addr := range to {
				s.mails[addr]++
			}
			s.mu.Unlock()
			say(verb, "250 2.0.0 queued")
		}
		to = nil
	}
	out.WriteString("220 slipping.example\r\n")
	for {
		if in.Buffered() == 0 && out.Flush() != nil {
			return
		}
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		fields := strings.Fields(line)
		addr := strings.Trim(line[strings.IndexByte(line, ':')+1:], "<>\r\n")
		switch fields[0] {
		case "EHLO":
			out.WriteString("250-slipping.example\r\n250-PIPELINING\r\n250 CHUNKING\r\n")
		case "MAIL":
			from, to = addr, nil
			say("MAIL", "250 2.1.0 ok")
		case "RCPT":
			if strings.HasPrefix(addr, "gone") {
				say("RCPT", "550 5.1.1 no such user")
			} else {
				to = append(to, addr)
				say("RCPT", "250 2.1.5 ok")
			}
		case "RSET":
			to = nil
			say("RSET", "250 2.0.0 ok")
		case "DATA":
			say("DATA", "354 go on")
			if out.Flush() != nil || skipToDot(in) != nil {
				return
			}
			end("dot")
		case "BDAT":
			size, _ := strconv.ParseInt(fields[1], 10, 64)
			if _, err := io.CopyN(io.Discard, in, size); err != nil {
				return
			}
			switch {
			case len(to) == 0:
				out.WriteString("503 5.5.1 no recipients\r\n")
			case len(fields) == 3:
				end("LAST")
			default:
				say("BDAT", "250 2.0.0 so far")
			}
		default:
			out.WriteString("221 2.0.0 bye\r\n")
			out.Flush()
			return
		}
	}
}

func TestOneReplyTooMany(t *testing.T) {
	var slips []slip
	for _, verb := range []string{"MAIL", "RCPT", "BDAT", "RSET"} {
		for nth := 1; nth <= 4; nth++ {
			for _, extra := range []string{"354 go on", "421 4.3.2 leaving"} {
				// Before the reply to RSET, or after the reply to a chunk, a 421 is followed by nothing that reveals it.
				slips = append(slips, slip{verb, nth, true, extra}, slip{verb, nth, verb == "BDAT", extra})
			}
		}
	}
	for nth := 1; nth <= 4; nth++ {
		slips = append(slips, slip{"RSET", nth, true, "451 4.3.0 later"}, slip{"RSET", nth, true, "550 5.3.0 no"})
		for _, extra := range []string{"250 2.0.0 ok", "354 go on", "451 4.3.0 later", "550 5.3.0 no"} {
			slips = append(slips, slip{"LAST", nth, true, extra}, slip{"dot", nth, true, extra})
		}
	}
	for _, s := range slips {
		t.Run(fmt.Sprintf("%s %d, before %v, %s", s.verb, s.nth, s.before, s.extra[:3]), func(t *testing.T) {
			t.Parallel()
			slipTest(t, s)
		})
	}
}

// slipTest sends several messages, one after the other.
func slipTest(t *testing.T, slip slip) {
	s := &slipping{slip: slip, mails: make(map[string]int)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { s.serve(nc) })
		}
	})
	limit := giveUp / 2
	client, err := smtprelay.New(smtprelay.Config{Addr: l.Addr().String(), TLS: smtprelay.TLSNone, Chunking: slip.verb != "dot",
		Limits: smtprelay.Limits{MaxConns: 1}, Timeouts: smtprelay.Timeouts{Command: limit, Data: limit, FinalReply: limit, Quit: limit}})
	if err != nil {
		t.Fatal(err)
	}
	var receipts []smtprelay.Receipt
	for _, m := range []struct{ from, to string }{
		{"a@x.example", "b0@y.example"}, {"refused@x.example", "b1@y.example,c1@y.example"}, {"a@x.example", "gone2@y.example,c2@y.example"},
		{"a@x.example", "b3@y.example"}, {"refused@x.example", "b4@y.example"},
	} {
		r, err := client.Send(t.Context(), smtprelay.Message{From: m.from, To: strings.Split(m.to, ","), Body: smtprelay.Bytes([]byte("Subject: step\r\n\r\n"))})
		t.Logf("%v: %v", m.to, err)
		receipts = append(receipts, r)
	}
	client.Close()
	l.Close()
	serving.Wait()
	for _, r := range receipts {
		for _, to := range r.Recipients {
			switch n := s.mails[to.To]; {
			case n > 1:
				t.Errorf("%s has it %d times", to.To, n)
			case n == 0 && to.Outcome == accepted, n == 1 && to.Outcome == notAccepted:
				t.Errorf("%s is reported as %v, but has it %d times", to.To, to.Outcome, n)
			}
		}
	}
}
