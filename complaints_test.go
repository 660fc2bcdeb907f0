package smtprelay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Each of these tests stands for a fault that was reported of another client; the table in TESTING.md tells which.

// A sender who has the next message ready as soon as one is accepted uses one connection, and not one more each time that
// he is faster than the bookkeeping.
func TestLoneSenderNeverOpensASecondConnection(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.MaxMessages = -1 })
		cfg := configOf(relay)
		cfg.Limits.MaxMessagesPerConn = -1
		client := newClient(t, cfg)
		sendNumbered(t, client, 500, 1)
		want(t, "connections opened", len(relay.Conns()), 1)
	})
}

// Fifty messages wait for the only connection, which is lost again and again: each is served by the next dial, at once.
func TestWaitersAreServedWhenTheOnlyConnectionDies(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		cfg := configOf(relay)
		cfg.Limits.MaxConns = 1
		client := newClient(t, cfg)
		done := make(chan []sent)
		go func() { done <- sendAtOnce(t.Context(), client, 0, 50) }() // ends when all have been sent
		const kills = 5
		for range kills {
			time.Sleep(150 * time.Millisecond)
			relay.CloseClientConnections()
		}
		all := <-done
		unknown := unknownOf(t, all)
		for _, s := range all {
			// 50 messages at a round trip each, five dials of four round trips, and a back-off of half a second behind each loss.
			if s.took > 50*20*time.Millisecond+kills*(80+500)*time.Millisecond {
				t.Errorf("message %d took %v", s.number, s.took)
			}
		}
		atMost(t, "messages of unknown fate", unknown, kills*4)
		checkLedger(t, relay, all)
		atMost(t, "open at once", relay.MaxOpen(), 1)
	})
}

func TestSendFailsWhereThereIsNoRelayHoweverOftenItIsTried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, attempts := range []int{1, 0, 7, -1} {
			var nobody noRelay
			cfg := nobody.config()
			cfg.Retry.MaxAttempts = attempts
			client := newClient(t, cfg)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			for _, s := range sendAtOnce(ctx, client, 0, 20) {
				if s.outcome() != smtprelay.NotAccepted || !contains(s.err, "connection refused") {
					t.Errorf("MaxAttempts %d: %v; want not accepted, and why", attempts, s.err)
				}
			}
			cancel()
			if _, err := client.Send(ctx, numbered(0)); err == nil {
				t.Errorf("MaxAttempts %d: no error", attempts)
			}
			if err := client.Ping(ctx); err == nil {
				t.Errorf("MaxAttempts %d: Ping finds nothing wrong", attempts)
			}
		}
	})
}

// The connection is full with the message, and no other can be opened: that is nothing to the message.
func TestFailedDialBehindTheLastMessageOfAConnectionCostsNoReceipt(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		var dials atomic.Int64
		cfg := configOf(relay)
		cfg.Retry.MaxAttempts = 2
		cfg.Limits.MaxConns = 1
		cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if dials.Add(1) > 1 {
				return nil, syscall.ECONNREFUSED
			}
			return relay.Dial(ctx, network, addr)
		}
		client := newClient(t, cfg)
		var all []sent
		for i := range 100 {
			all = append(all, sendOne(t.Context(), client, i))
		}
		allAccepted(t, relay, all)
		if s := sendOne(t.Context(), client, 100); s.outcome() != smtprelay.NotAccepted {
			t.Errorf("the 101st: %v; want not accepted", s.err)
		}
	})
}

// A relay that takes its time to close: its connections count until then, and the cap holds.
func TestConnectionsCountUntilTheRelayHasClosedThem(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		relay.Fault(smtptest.Fault{At: smtptest.Quit, Delay: 3 * time.Second, Count: -1})
		cfg := configOf(relay)
		cfg.Limits.MaxMessagesPerConn = 5
		client := newClient(t, cfg)
		all := sendAtOnce(t.Context(), client, 0, 500)
		client.Close()
		allAccepted(t, relay, all)
		want(t, "most open at once", relay.MaxOpen(), 10)
		want(t, "connections refused", relay.Refused421(), 0)
	})
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("over sockets, TLS: %t", secure), func(t *testing.T) {
			relay := newRelay(t, func(s *smtptest.Server) { s.NoTLS = !secure })
			cfg := configOf(relay)
			cfg.Limits.MaxMessagesPerConn = 5
			client := newClient(t, cfg)
			all := sendAtOnce(t.Context(), client, 0, 250)
			client.Close()
			allAccepted(t, relay, all)
			atMost(t, "open at once", relay.MaxOpen(), 10)
			want(t, "connections refused", relay.Refused421(), 0)
		})
	}
}

// openTen has ten messages go out on ten connections, which are idle then.
func openTen(t *testing.T, relay *smtptest.Server, client *smtprelay.Client, first int) []sent {
	t.Helper()
	slow := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: time.Second, Count: -1})
	defer slow.Remove()
	results := make([]sent, 10)
	var senders sync.WaitGroup
	for i := range results { // one after the other, so that each finds the connections before it busy
		senders.Go(func() { results[i] = sendOne(t.Context(), client, first+i) })
		if err := slow.Wait(t.Context(), i+1); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
	}
	senders.Wait()
	synctest.Wait()
	want(t, "Stats().IdleConns", client.Stats().IdleConns, 10)
	return results
}

// usedBefore tells one of the first ten connections, when it has carried a message before this one.
func usedBefore(e smtptest.Event) bool { return e.Conn <= 10 && e.Message > 1 }

// The relay has closed its idle connections, in one way or another, and the next messages find that out: nobody else does.
func TestFirstMessagesAfterIdleTimeFindNoDeadConnection(t *testing.T) {
	for _, test := range []struct {
		name string
		smtptest.Fault
		longest time.Duration // that a message may take
	}{
		{"closed", smtptest.Fault{At: smtptest.Idle, Delay: 5 * time.Second, Drop: true}, 0},
		{"reset", smtptest.Fault{At: smtptest.Idle, Delay: 5 * time.Second, Reset: true}, 0},
		{"421", smtptest.Fault{At: smtptest.Idle, Delay: 5 * time.Second, Reply: "421 4.4.2 timeout", Drop: true}, 0},
		{"451 (Amazon SES, Gmail)", smtptest.Fault{At: smtptest.Idle, Delay: 5 * time.Second, Reply: "451 4.4.2 timeout", Drop: true}, 0},
		{"reset by what is said first, as after a long sleep", smtptest.Fault{At: smtptest.Mail, Reset: true, When: usedBefore}, 0},
		{"421 to what is said first", smtptest.Fault{At: smtptest.Mail, Reply: "421 4.4.2 timeout", Drop: true, When: usedBefore}, 0},
		{"forgotten by something on the way", smtptest.Fault{At: smtptest.Mail, Stall: true, When: usedBefore}, 5 * time.Minute},
	} {
		t.Run(test.name, func(t *testing.T) {
			inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
				relay := newRelay(t, near)
				cfg := configOf(relay)
				cfg.Limits.MaxIdleTime, cfg.Limits.MaxConnAge = -1, -1
				cfg.Retry.MaxAttempts = 1
				client := newClient(t, cfg)
				all := openTen(t, relay, client, 0)
				test.Fault.Count = 10
				if test.Fault.At == smtptest.Idle {
					relay.Fault(test.Fault)
					time.Sleep(6 * time.Second)
					want(t, "Stats().IdleConns after 6 s", client.Stats().IdleConns, 0)
					want(t, "Stats().OpenConns after 6 s", client.Stats().OpenConns, 0)
				} else {
					time.Sleep(8 * time.Hour)
					relay.Fault(test.Fault)
				}
				after := sendAtOnce(t.Context(), client, 1000, 200)
				for _, s := range after {
					if s.err != nil && relay.Chunking && s.outcome() == smtprelay.Unknown && test.Fault.At == smtptest.Mail && test.Reply == "" {
						s.err = nil // it left with its envelope, and nothing came back: nobody can know
						continue
					}
					if s.err != nil {
						t.Errorf("message %d: %v", s.number, s.err)
					}
					if s.took > test.longest {
						t.Errorf("message %d took %v, want %v at most", s.number, s.took, test.longest)
					}
				}
				client.Close()
				relay.Close()
				checkLedger(t, relay, append(all, after...))
			})
		})
	}
}

// Connections that end while nobody uses them are nobody's error: a Trace is told, and there is no other word of it.
func TestIdleConnectionsEndInSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var printed bytes.Buffer
		log.SetOutput(&printed)
		defer log.SetOutput(os.Stderr)
		defer slog.SetDefault(slog.Default())
		slog.SetDefault(slog.New(slog.NewTextHandler(&printed, nil)))

		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory = true })
		cfg := configOf(relay)
		var mu sync.Mutex    // guards the next
		var reasons []string // of the ends that the Trace is told
		cfg.Trace = &smtprelay.Trace{ConnClosed: func(_ context.Context, c smtprelay.CloseInfo) {
			mu.Lock()
			defer mu.Unlock()
			reasons = append(reasons, c.Reason)
		}}
		client := newClient(t, cfg)
		sendNumbered(t, client, 1, 1)
		time.Sleep(time.Minute) // our own limit
		for _, f := range []smtptest.Fault{
			{Reply: "421 4.4.2 timeout", Drop: true}, {Reply: "451 4.4.2 timeout", Drop: true}, {Drop: true}, {Reset: true}, {Reply: "220 hello"},
		} {
			sendNumbered(t, client, 1, 1)
			f.At = smtptest.Idle
			relay.Fault(f)
			time.Sleep(time.Minute)
		}
		mu.Lock()
		defer mu.Unlock()
		if want := []string{"idle", "fault", "fault", "fault", "fault", "fault"}; !slices.Equal(reasons, want) {
			t.Errorf("connections ended for the reasons %q, want %q", reasons, want)
		}
		if printed.Len() > 0 {
			t.Errorf("printed: %s", printed.String())
		}
		want(t, "messages accepted", int(client.Stats().Accepted), 6)
		want(t, "messages not accepted", int(client.Stats().NotAccepted), 0)
	})
}

// Whatever the relay refuses, the connection goes on and is counted.
func TestRefusedMessagesLeaveNoConnectionBehind(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) {
			s.Reject = map[string]string{"gone@example.org": "550 5.1.1 no such user", "bad@example.com": "550 5.7.1 not from you"}
		})
		relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Rcpt: "spam@example.org", Reply: "554 5.7.1 spam", Count: -1})
		client := newClient(t, configOf(relay))
		var senders sync.WaitGroup
		for i := range 50 {
			senders.Go(func() {
				for j, m := range []smtprelay.Message{
					{From: "shop@example.com", To: []string{"gone@example.org"}},
					{From: "bad@example.com", To: []string{"ann@example.org"}},
					{From: "shop@example.com", To: []string{"spam@example.org"}},
					{From: "shop@example.com", To: []string{"ann@example.org", "gone@example.org"}, AllOrNothing: true},
				} {
					m.Body = smtprelay.Bytes([]byte("Subject: refused\r\n\r\n"))
					if _, err := client.Send(t.Context(), m); !smtprelay.SafeToRetry(err) || failure(err).Temporary() {
						t.Errorf("sender %d, message %d: %v; want it refused", i, j, err)
					}
				}
			})
		}
		senders.Wait()
		synctest.Wait()
		s := client.Stats()
		want(t, "Stats().OpenConns", s.OpenConns, s.IdleConns)
		want(t, "connections open at the relay", relay.Open(), s.IdleConns)
		atMost(t, "open at once", relay.MaxOpen(), 10)
		want(t, "messages at the relay", relay.Accepted(), 0)
		time.Sleep(time.Minute)
		want(t, "connections open after a minute", relay.Open(), 0)
	})
}

func TestIdleConnectionsAreAllUsedAgain(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near)
		client := newClient(t, configOf(relay))
		for round := range 5 {
			noneFailed(t, openTen(t, relay, client, 10*round))
			want(t, "connections opened", len(relay.Conns()), 10)
			for _, c := range relay.Conns() {
				want(t, fmt.Sprintf("messages on connection %d", c.Conn), c.Accepted, round+1)
			}
		}
	})
}

// openFiles is the number of this process's open files, or 0 where the system does not tell.
func openFiles() int {
	files, _ := os.ReadDir("/dev/fd")
	return len(files)
}

// countedConn knows how many of its kind are open.
type countedConn struct {
	net.Conn
	open *atomic.Int64
	once sync.Once
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.open.Add(-1) })
	return c.Conn.Close()
}

func TestFailedGreetingsLeaveNoDescriptorOpen(t *testing.T) {
	const times = 250
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	greetings := []string{"554 5.7.1 not you\r\n", "421 4.3.2 not now\r\n", "hello there\r\n", ""}
	var relay sync.WaitGroup
	relay.Go(func() { // until the listener is closed
		for n := 0; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, greetings[n%len(greetings)])
			conn.Close()
		}
	})
	var open atomic.Int64
	client := newClient(t, smtprelay.Config{
		Addr:  l.Addr().String(),
		TLS:   smtprelay.TLSNone,
		Retry: smtprelay.Retry{MaxAttempts: 1, MinBackoff: 1, MaxBackoff: 1},
		Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			open.Add(1)
			return &countedConn{Conn: conn, open: &open}, nil
		},
	})
	before := openFiles()
	for range times * len(greetings) {
		if _, err := client.Send(t.Context(), numbered(0)); !smtprelay.SafeToRetry(err) {
			t.Fatal(err)
		}
	}
	client.Close()
	want(t, "connections open", int(open.Load()), 0)
	if n := int(client.Stats().DialErrors); n < times*len(greetings) {
		t.Errorf("Stats().DialErrors: got %d, want %d at least", n, times*len(greetings))
	}
	atMost(t, "open files", openFiles(), before+5) // the runtime and the relay may hold a few, but not one for each failure
	l.Close()
	relay.Wait()
}

// A relay that answers nothing but goes away 15 ms later, always: the attempts are bounded, and so is the time.
func TestRelayThatAlwaysDropsIsGivenUp(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		for _, step := range []smtptest.Step{smtptest.Connect, smtptest.EHLO, smtptest.Auth, smtptest.Mail, smtptest.Rcpt, smtptest.Body} {
			relay := newRelay(t, near)
			relay.Fault(smtptest.Fault{At: step, Delay: 15 * time.Millisecond, Reset: true, Count: -1})
			client := newClient(t, configOf(relay))
			m := numbered(0)
			m.Body = smtprelay.Bytes(make([]byte, 200_000)) // more than is on its way before the loss
			began := time.Now()
			_, err := client.Send(t.Context(), m)
			e := failure(err)
			if e.Outcome != smtprelay.NotAccepted || !e.Temporary() || e.Attempts != 4 {
				t.Errorf("dropped at %v: %v, %d attempts; want not accepted after 4", step, err, e.Attempts)
			}
			if took := time.Since(began); took > 4*time.Second { // back-offs of 0.5, 1 and 2 s at most
				t.Errorf("dropped at %v: took %v", step, took)
			}
			want(t, "connections", len(relay.Conns()), 4)
			want(t, "messages at the relay", relay.Accepted(), 0)
		}
	})
}

// chunkSinkConn is a connection to a relay that takes messages in chunks and keeps nothing of them.
type chunkSinkConn struct {
	sinkConn
	line   []byte
	left   int    // of the chunk
	reply  string // to it
	mailed bool   // there was a MAIL
}

func (s *chunkSinkConn) RemoteAddr() net.Addr { return nil }

func (s *chunkSinkConn) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if s.left > 0 {
			k := min(s.left, len(p))
			s.left, p, s.received = s.left-k, p[k:], s.received+int64(k)
			if s.left == 0 {
				s.replies <- s.reply
			}
			continue
		}
		s.line, p = append(s.line, p[0]), p[1:]
		if !bytes.HasSuffix(s.line, []byte("\r\n")) {
			continue
		}
		verb, arg, _ := strings.Cut(string(s.line[:len(s.line)-2]), " ")
		s.line = s.line[:0]
		switch verb {
		case "BDAT":
			size, _, _ := strings.Cut(arg, " ")
			s.left, _ = strconv.Atoi(size)
			switch {
			case !s.mailed: // out of order
				s.reply = "503 MAIL first\r\n"
			case s.left == 0:
				s.replies <- "250 ok\r\n"
			default:
				s.reply = "250 ok\r\n"
			}
		case "MAIL":
			s.mailed = true
			s.replies <- "250 ok\r\n"
		case "EHLO":
			s.replies <- "250-sink\r\n250-PIPELINING\r\n250-SIZE 2000000000\r\n250 CHUNKING\r\n"
		case "QUIT":
			s.replies <- "221 bye\r\n"
			close(s.replies)
		default:
			s.replies <- "250 ok\r\n"
		}
	}
	return n, nil
}

func TestBodyOfOneGiBPassesInConstantMemoryInChunks(t *testing.T) {
	conn := &chunkSinkConn{sinkConn: sinkConn{replies: make(chan string, 8)}}
	conn.replies <- "220 sink ESMTP\r\n"
	client := newClient(t, smtprelay.Config{
		Addr: "sink.example:25",
		TLS:  smtprelay.TLSNone, Chunking: true,
		Dial: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	})
	sendOneGiB(t, client, &conn.sinkConn)
}

// byteReads lets no Read return more than one octet.
type byteReads struct{ net.Conn }

func (c byteReads) Read(p []byte) (int, error) { return c.Conn.Read(p[:min(1, len(p))]) }

// 1,000 recipients through a window of 4 KiB, their replies read octet by octet, and one in ten of them refused in three
// lines: no deadlock, and no reply is taken for another one's.
func TestThousandRecipientsThroughANarrowWindow(t *testing.T) {
	for _, pipelining := range []smtprelay.Pipelining{smtprelay.PipelineAcross, smtprelay.PipelineWithin, smtprelay.PipelineOff} {
		inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
			relay := newRelay(t, near, func(s *smtptest.Server) {
				s.Buffer = 4096
				s.Reject = map[string]string{}
				for i := 0; i < 1000; i += 10 {
					s.Reject[fmt.Sprintf("r%d@y.example", i)] = fmt.Sprintf("550-5.1.1 no such user\n550-5.1.1 r%d is unknown\n550 5.1.1 here", i)
				}
			})
			cfg := configOf(relay)
			cfg.Pipelining = pipelining
			cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				conn, err := relay.Dial(ctx, network, addr)
				return byteReads{conn}, err
			}
			client := newClient(t, cfg)
			m := numbered(0)
			m.To = nil
			for i := range 1000 {
				m.To = append(m.To, fmt.Sprintf("r%d@y.example", i))
			}
			receipt, err := client.Send(t.Context(), m)
			if e := failure(err); e.Outcome != smtprelay.Accepted || len(e.Refused) != 100 {
				t.Fatalf("%v; want it accepted for 900 of 1,000", err)
			}
			for i, r := range receipt.Recipients {
				switch refused := i%10 == 0; {
				case !refused && r.Outcome != smtprelay.Accepted:
					t.Errorf("%s: %v", r.To, r.Outcome)
				case refused && (r.Outcome != smtprelay.NotAccepted || !strings.Contains(r.Message, fmt.Sprintf("r%d is unknown", i))):
					t.Errorf("%s: %v, %q", r.To, r.Outcome, r.Message)
				}
			}
			got := relay.Messages()
			want(t, "messages", len(got), 1)
			want(t, "recipients", len(got[0].To), 900)
		})
	}
}

// addressedConn is a connection with another local address.
type addressedConn struct {
	net.Conn
	local net.Addr
}

func (c addressedConn) LocalAddr() net.Addr { return c.local }

// Relays refuse a client that calls itself localhost, and some ban it.
func TestEHLONameIsNeverLocalhost(t *testing.T) {
	host, err := os.Hostname()
	named := err == nil && strings.Contains(host, ".") && !strings.HasPrefix(host, "localhost.")
	for _, test := range []struct{ local, want string }{
		{"192.0.2.7", "[192.0.2.7]"},
		{"2001:db8::7", "[IPv6:2001:db8::7]"},
		{"127.0.0.1", "[127.0.0.1]"},
		{"::1", "[IPv6:::1]"},
		{"::ffff:192.0.2.7", "[192.0.2.7]"},
	} {
		synctest.Test(t, func(t *testing.T) {
			relay := newRelay(t, func(s *smtptest.Server) { s.InMemory = true })
			var said string
			relay.Fault(smtptest.Fault{At: smtptest.EHLO, Count: -1, When: func(e smtptest.Event) bool {
				said = strings.TrimPrefix(e.Line, "EHLO ")
				return false
			}})
			cfg := configOf(relay)
			cfg.LocalName = ""
			cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				conn, err := relay.Dial(ctx, network, addr)
				return addressedConn{conn, &net.TCPAddr{IP: net.ParseIP(test.local), Port: 4321}}, err
			}
			client := newClient(t, cfg)
			sendNumbered(t, client, 1, 1)
			if want := map[bool]string{true: host, false: test.want}[named]; said != want {
				t.Errorf("from %s: EHLO %s, want %s", test.local, said, want)
			}
		})
	}
}

// Two messages of a relay may not be told apart by who was faster: whatever goes wrong, what the callers were told adds up
// to what the relay has.
func TestReceiptsAddUpToWhatTheRelayHas(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		relay := newRelay(t, near, func(s *smtptest.Server) { s.Delay = 20 * time.Millisecond })
		client := newClient(t, configOf(relay))
		var n atomic.Int64
		every := func(k int64) func(smtptest.Event) bool {
			return func(smtptest.Event) bool { return n.Add(1)%k == 0 }
		}
		for _, f := range []smtptest.Fault{
			{At: smtptest.Mail, Drop: true, When: every(40)},
			{At: smtptest.Mail, Reply: "421 4.3.2 not now", Drop: true, When: every(40)},
			{At: smtptest.Rcpt, Reply: "550 5.1.1 nobody", When: every(20)},
			{At: smtptest.FinalDot, Reply: "451 4.3.0 later", When: every(30)},
			{At: smtptest.FinalDot, Reset: true, When: every(40)},
			{At: smtptest.Accepted, Drop: true, When: every(30)},
		} {
			f.Count = -1
			relay.Fault(f)
		}
		all := sendAtOnce(t.Context(), client, 0, 1000)
		client.Close()
		relay.Close()
		checkLedger(t, relay, all)
		var accepted, unknown, not int
		for _, s := range all {
			switch s.outcome() {
			case smtprelay.Accepted:
				accepted++
			case smtprelay.Unknown:
				unknown++
			default:
				not++
			}
		}
		if accepted > relay.Accepted() || accepted+unknown < relay.Accepted() || unknown == 0 || not == 0 {
			t.Errorf("%d accepted, %d unknown, %d not accepted; the relay has %d", accepted, unknown, not, relay.Accepted())
		}
		s := client.Stats()
		if int(s.Accepted) != accepted || int(s.Unknown) != unknown || int(s.NotAccepted) != not {
			t.Errorf("Stats %+v; want %d accepted, %d unknown, %d not accepted", s, accepted, unknown, not)
		}
	})
}

// errors.As finds the outcome in the error of every call that can fail.
func TestEveryErrorTellsItsOutcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory = true })
		var nobody noRelay
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		closed := newClient(t, configOf(relay))
		closed.Close()
		cfg := nobody.config()
		cfg.Retry.MaxAttempts = 1
		for name, err := range map[string]error{
			"no address":    func() error { _, err := smtprelay.New(smtprelay.Config{}); return err }(),
			"a bad address": sendErr(t.Context(), newClient(t, configOf(relay)), smtprelay.Message{From: "a@example.com", To: []string{"nobody"}, Body: smtprelay.Bytes([]byte("x"))}),
			"no relay":      sendErr(t.Context(), newClient(t, cfg), numbered(0)),
			"context":       sendErr(gone, newClient(t, configOf(relay)), numbered(0)),
			"closed":        sendErr(t.Context(), closed, numbered(0)),
			"SendMail":      newClient(t, cfg).SendMail("a@example.com", []string{"b@example.org"}, []byte("x")),
			"Ping":          newClient(t, cfg).Ping(t.Context()),
		} {
			wrapped := fmt.Errorf("order 7: %w", err)
			e, ok := errors.AsType[*smtprelay.Error](wrapped)
			if !ok || e.Outcome != smtprelay.NotAccepted || !smtprelay.SafeToRetry(wrapped) {
				t.Errorf("%s: %v; want an *Error, not accepted", name, err)
			}
		}
	})
}

// Who sends again to whoever was refused for now must not do so to somebody who may have the message.
func TestRecipientOfUnknownFateWasNotRefusedForNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory = true })
		relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true})
		client := newClient(t, configOf(relay))
		e := failure(sendErr(t.Context(), client, numbered(0)))
		if e.Outcome != smtprelay.Unknown || len(e.Refused) != 1 || e.Refused[0].Outcome != smtprelay.Unknown {
			t.Fatalf("%v, refused %v; want one of unknown fate", e, e.Refused)
		}
		if e.Refused[0].Temporary() {
			t.Error("refused for now, it says")
		}
		want(t, "Stats().Refused", int(client.Stats().Refused), 0)
	})
}

func sendErr(ctx context.Context, client *smtprelay.Client, m smtprelay.Message) error {
	_, err := client.Send(ctx, m)
	return err
}

// The table of complaints in TESTING.md has 78 of them, each with a reason why it cannot concern this module, or with tests
// and transcripts, which must be there.
func TestComplaintsAreHeldByTestsThatExist(t *testing.T) {
	page, err := os.ReadFile("TESTING.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(page), "\n## Complaints of other clients\n")
	if !found {
		t.Fatal("TESTING.md has no section on the complaints of other clients")
	}
	var code strings.Builder
	for _, dir := range []string{".", "internal/test/dialogue", "internal/test/storm", "internal/wire", "smtptest"} {
		files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			code.Write(text)
		}
	}
	row := regexp.MustCompile(`(?m)^\| (\d+) \|.*\| ([^|]*) \|$`)
	name := regexp.MustCompile("`([^`]+)`")
	number := 0
	for _, m := range row.FindAllStringSubmatch(section, -1) {
		number++
		if m[1] != strconv.Itoa(number) {
			t.Errorf("complaint %d is numbered %s", number, m[1])
		}
		for _, n := range name.FindAllStringSubmatch(m[2], -1) {
			_, err := os.Stat(filepath.Join("internal/test/dialogue/testdata", n[1]))
			isFunc := strings.Contains(code.String(), "\nfunc "+n[1]+"(")
			if script := strings.HasSuffix(n[1], ".txt"); script && err != nil || !script && !isFunc {
				t.Errorf("complaint %d: there is no %s", number, n[1])
			}
		}
		if strings.TrimSpace(m[2]) == "" {
			t.Errorf("complaint %d is held by nothing", number)
		}
	}
	want(t, "complaints", number, 78)
}
