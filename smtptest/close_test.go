package smtptest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log"
	"net"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestCloseTellsIdleClients(t *testing.T) {
	s := NewUnstartedServer()
	bubble(t, s, func(t *testing.T) {
		greeted := dial(t, s)
		greeted.want("220 ")
		idle := open(t, s)
		began := time.Now()
		closed := make(chan struct{})
		go func() { s.Close(); close(closed) }()
		for _, r := range []*raw{greeted, idle} {
			r.want("421 4.3.2 smtp.test is shutting down")
			r.closed()
		}
		<-closed
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v", took)
		}
		if _, err := s.Dial(t.Context(), "", ""); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v", err)
		}
	})
}

func TestCloseDoesNotWaitForClientsThatKeepOpen(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		idle := open(t, s)
		quit := open(t, s)
		quit.say("QUIT")
		quit.want("221 ")
		began := time.Now()
		s.Close()
		if took := time.Since(began); took >= lingerTime {
			t.Errorf("took %v", took)
		}
		idle.want("421 ")
	})
}

func TestCloseWaitsForTransactions(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		r.want("250 ", "250 ", "354 ")
		closed := make(chan struct{})
		go func() { s.Close(); close(closed) }()
		time.Sleep(3 * time.Second)
		r.say("text", ".")
		r.want("250 Ok", "421 ")
		r.closed()
		<-closed
		if s.Stats().Accepted != 1 {
			t.Errorf("%d accepted", s.Stats().Accepted)
		}
	})
}

// Close gives a client in a transaction some time for its next command, counted from the last one.
func TestCloseGivesAnOpenTransactionAMoment(t *testing.T) {
	tests := []struct {
		why   string
		delay time.Duration
		says  []string
		wants []string
	}{
		{"after a sender", 0, []string{"MAIL FROM:<a@x.example>"}, []string{"250 "}},
		{"between chunks", 0, []string{"MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 2", ""}, []string{"250 ", "250 ", "250 "}},
		{"far away", time.Second, []string{"MAIL FROM:<a@x.example>"}, []string{"250 "}},
	}
	for _, tt := range tests {
		t.Run(tt.why, func(t *testing.T) {
			s := chunking()
			s.Delay = tt.delay
			bubble(t, s, func(t *testing.T) {
				r := open(t, s)
				r.say(tt.says...)
				r.want(tt.wants...)
				time.Sleep(time.Minute)
				closed := make(chan time.Time)
				began := time.Now()
				go func() { s.Close(); closed <- time.Now() }()
				time.Sleep(lastWords / 2)
				r.say("NOOP") // takes half a round trip, and restarts the wait
				r.want("250 ", "421 4.3.2 ")
				r.closed()
				if took := (<-closed).Sub(began); took < lastWords*3/2+tt.delay || took >= lastWords*2+3*tt.delay {
					t.Errorf("took %v", took)
				}
			})
		})
	}
}

// After a refusal a client may leave its transaction open until it has the next message: the relay cannot tell an idle client
// from one that continues.
func TestCloseDoesNotWaitAfterARefusal(t *testing.T) {
	mail, no, yes := "MAIL FROM:<a@x.example>", "RCPT TO:<no@y.example>", "RCPT TO:<b@y.example>"
	tests := []struct {
		why   string
		says  []string
		wants []string
	}{
		{"of the only recipient", []string{mail, no}, []string{"250 ", "550 "}},
		{"of the first of two recipients", []string{mail, no, yes}, []string{"250 ", "550 ", "250 "}},
		{"of the last of two recipients", []string{mail, yes, no}, []string{"250 ", "250 ", "550 "}},
		{"of DATA", []string{mail, yes, "DATA"}, []string{"250 ", "250 ", "452 "}},
		{"of a second sender", []string{mail, mail}, []string{"250 ", "503 "}},
		{"of a chunk", []string{mail, yes, "BDAT 2", "", "BDAT 2", ""}, []string{"250 ", "250 ", "250 ", "452 "}},
	}
	for _, tt := range tests {
		t.Run(tt.why, func(t *testing.T) {
			s := chunking()
			s.Reject = map[string]string{"no@y.example": "550 no"}
			bubble(t, s, func(t *testing.T) {
				s.Fault(Fault{At: Data, Reply: "452 4.3.1 full"})
				s.Fault(Fault{At: Bdat, Nth: 2, Reply: "452 4.3.1 full"})
				r := open(t, s)
				r.say(tt.says...)
				r.want(tt.wants...)
				began := time.Now()
				closed := make(chan struct{})
				go func() { s.Close(); close(closed) }()
				r.want("421 4.3.2 ")
				r.closed()
				<-closed
				if took := time.Since(began); took != 0 { // in a bubble time passes only while everything waits
					t.Errorf("waited %v", took)
				}
			})
		})
	}
}

// A refusal in one transaction does not affect the next.
func TestCloseWaitsForTheTransactionAfterARefusedOne(t *testing.T) {
	s := plainRelay()
	s.Reject = map[string]string{"no@y.example": "550 no"}
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>", "RCPT TO:<no@y.example>", "RSET", "MAIL FROM:<a@x.example>")
		r.want("250 ", "550 ", "250 ", "250 ")
		began := time.Now()
		s.Close()
		if took := time.Since(began); took < lastWords {
			t.Errorf("waited %v", took)
		}
	})
}

func TestCloseEndsWithTheLastQuit(t *testing.T) {
	s := plainRelay()
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		r.say("MAIL FROM:<a@x.example>")
		r.want("250 ")
		began := time.Now()
		closed := make(chan struct{})
		go func() { s.Close(); close(closed) }()
		synctest.Wait()
		r.say("RSET", "QUIT")
		r.want("250 ", "221 ")
		r.closed()
		<-closed
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v", took)
		}
	})
}

func TestCloseTellsWhoHangs(t *testing.T) {
	var out bytes.Buffer
	log.SetOutput(&out)
	defer log.SetOutput(os.Stderr)
	s := chunking()
	bubble(t, s, func(t *testing.T) {
		body, chunk := open(t, s), open(t, s)
		body.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
		body.want("250 ", "250 ", "354 ")
		chunk.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "BDAT 100", "text")
		chunk.want("250 ", "250 ")
		began := time.Now()
		s.Close()
		if took := time.Since(began); took != patience {
			t.Errorf("took %v", took)
		}
		body.closed()
		chunk.closed()
	})
	for _, want := range []string{
		"smtptest.Server blocked in Close after 5s",
		"1 from client: in a body, after 1 messages begun and 0 accepted",
		"2 from client: in a body, after 1 messages begun and 0 accepted",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q does not say %q", &out, want)
		}
	}
}

func TestCloseEndsFaultsAtOnce(t *testing.T) {
	for _, f := range []Fault{{At: FinalDot, Stall: true}, {At: FinalDot, Delay: time.Hour}, {At: Body, Stall: true}} {
		s := plainRelay()
		bubble(t, s, func(t *testing.T) {
			s.Fault(f)
			r := open(t, s)
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
			r.want("250 ", "250 ", "354 ")
			r.say("text", ".")
			synctest.Wait()
			began := time.Now()
			s.Close()
			if took := time.Since(began); took >= patience {
				t.Errorf("%+v: took %v", f, took)
			}
		})
	}
}

func TestCloseClientConnections(t *testing.T) {
	s := NewUnstartedServer()
	bubble(t, s, func(t *testing.T) {
		idle, stalled := open(t, s), open(t, s)
		s.Fault(Fault{At: Noop, Stall: true})
		stalled.say("NOOP")
		synctest.Wait()
		s.CloseClientConnections()
		if s.Stats().Open != 0 {
			t.Errorf("%d open", s.Stats().Open)
		}
		idle.closed()
		stalled.closed()
		open(t, s).send("a@x.example", "b@y.example", "text")
	})
}

func TestCloseRightAfterStart(t *testing.T) {
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			s := plainRelay()
			s.InMemory = true
			s.Start()
			s.Close()
		})
	}
}

func TestCloseOverSockets(t *testing.T) {
	before := runtime.NumGoroutine()
	s := NewUnstartedServer()
	s.Delay = time.Millisecond
	s.Start()
	idle := open(t, s)
	half := open(t, s)
	s.Fault(Fault{At: Noop, Stall: true})
	half.say("NOOP")
	s.Close()
	s.Close()
	idle.want("421 ")
	noneLeft(t, before)
	if nc, err := net.Dial("tcp", s.Addr()); err == nil {
		nc.Close()
		t.Error("the port is still open")
	}
	NewUnstartedServer().Close() // never started: nothing to do
}

func TestDropBodies(t *testing.T) {
	s := plainRelay()
	s.DropBodies = true
	s.MaxSize = -1
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		line := strings.Repeat("0123456789", 9) + "\r\n"
		const lines = 1 << 17 // 12 MB
		hash := sha256.New()
		for range 2 {
			hash.Reset()
			r.say("MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
			r.want("250 ", "250 ", "354 ")
			for range lines {
				io.WriteString(r, line)
				io.WriteString(hash, line)
			}
			r.say(".")
			r.want("250 ")
		}
		m := s.Messages()[1]
		if m.Body != nil || m.Size != lines*int64(len(line)) || !bytes.Equal(m.SHA256[:], hash.Sum(nil)) {
			t.Errorf("%d octets kept, size %d", len(m.Body), m.Size)
		}
		if s.Stats().Duplicates != 1 {
			t.Errorf("%d duplicates", s.Stats().Duplicates)
		}
		if c := cap(s.conns[0].msg.buf); c > 1<<20 {
			t.Errorf("the relay holds %d octets", c)
		}
	})
}

func TestManyClientsAtOnce(t *testing.T) {
	s := start(t, NewUnstartedServer())
	const clients, messages = 8, 30
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			r := open(t, s)
			for range messages {
				r.send("a@x.example", "b@y.example", "text")
			}
			r.say("QUIT")
			r.want("221 ")
			r.closed()
		})
	}
	wg.Wait()
	if s.Stats().Accepted != clients*messages || s.Stats().Duplicates != clients*messages-1 || s.Stats().Auths != clients || s.Stats().MaxOpen > clients || s.Stats().Open != 0 {
		t.Errorf("%d accepted, %d duplicates, %d auths, at most %d open, now %d", s.Stats().Accepted, s.Stats().Duplicates, s.Stats().Auths, s.Stats().MaxOpen, s.Stats().Open)
	}
	ids := make(map[string]bool)
	for _, m := range s.Messages() {
		ids[m.ID] = true
	}
	if len(ids) != clients*messages {
		t.Errorf("%d different IDs", len(ids))
	}
}

func TestSmallBuffersDoNotDeadlock(t *testing.T) {
	s := plainRelay()
	s.Buffer = 300
	bubble(t, s, func(t *testing.T) {
		r := open(t, s)
		go func() { // a client that reads and writes in separate goroutines
			io.WriteString(r, "MAIL FROM:<a@x.example>\r\n"+strings.Repeat("RCPT TO:<b@y.example>\r\n", 1000)+"DATA\r\n")
		}()
		for range 1001 {
			r.want("250 ")
		}
		r.want("354 ")
	})
}

func TestServeFlagLeavesARelayToTalkTo(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestTurnsOverSockets$", "-smtptest.serve=127.0.0.1:0")
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	line, err := bufio.NewReader(stderr).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(strings.TrimSpace(strings.TrimPrefix(line, "smtptest.Server: ")))
	if err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	r := &raw{t: t, Conn: nc, br: bufio.NewReader(nc)}
	r.want("220 SG ESMTP service ready at smtp.test")
}

// A configuration without an address would be for a real relay, and TLSNone would be its TLS mode.
func TestServerThatWasNotStartedHasNoConfig(t *testing.T) {
	s := NewUnstartedServer()
	for name, call := range map[string]func(){
		"Addr":   func() { s.Addr() },
		"URL":    func() { s.URL() },
		"Config": func() { s.Config() },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s does not panic", name)
				}
			}()
			call()
		}()
	}
}

func TestConfigs(t *testing.T) {
	s := start(t, NewUnstartedServer())
	cfg := s.Config()
	if cfg.Addr != s.Addr() || cfg.Password != s.Password || cfg.Dial != nil || cfg.TLSConfig.RootCAs != s.Roots() {
		t.Errorf("%v", cfg)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Dial(ctx, "", ""); err == nil {
		t.Error("dialled with a context that has ended")
	}
	defer func() {
		if recover() == nil {
			t.Error("started twice")
		}
	}()
	s.Start()
}

// FuzzServer sends a relay arbitrary input. It must neither panic nor hang, nor accept a message without a whole dialogue.
func FuzzServer(f *testing.F) {
	f.Add([]byte("EHLO x\r\nMAIL FROM:<a@x.example>\r\nRCPT TO:<b@y.example>\r\nBDAT 3\r\nabcBDAT 1 LAST\r\ndQUIT\r\n"))
	f.Add([]byte("HELO x\r\nMAIL FROM:<>\r\nRCPT TO:<\"a>b\"@y.example>\r\nDATA\r\n"))
	f.Add([]byte("AUTH LOGIN\r\n*\r\nSTARTTLS\r\n\x16\x03\x01\x00\x05hello"))
	f.Add([]byte("MAIL FROM:<a@b> SIZE=9999999999 BODY=8BITMIME\r\nRCPT TO:x\r\nBDAT\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		synctest.Test(t, func(t *testing.T) {
			s := NewUnstartedServer()
			s.InMemory, s.Chunking = true, true
			s.NoAuth = len(in)%2 == 0
			s.Behind = Habit(len(in) / 2 % 3)
			s.KeepRefusedChunks = len(in)/6%2 == 0
			s.KeepEnvelopeOnRset = len(in)/12%2 == 0
			s.Start()
			defer s.Close()
			nc, err := s.Dial(t.Context(), "", "")
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			go io.Copy(io.Discard, nc)
			synctest.Wait() // the client must not send before the greeting
			nc.Write(in)
			synctest.Wait()
			for _, m := range s.Messages() {
				if len(m.To) == 0 {
					t.Errorf("%+v", m)
				}
			}
		})
	})
}
