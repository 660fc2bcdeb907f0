// What a Trace reports: contexts, names, and lessons. That it contains no secret is tested in secrets_test.go.
package test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/relaytest"
	"github.com/smtprelay/smtprelay/smtptest"
)

type spanKey struct{}

// spans is a Trace that begins a span for each Send, and records which span each other hook belongs to, with its arguments.
type spans struct {
	mu  sync.Mutex
	log []string
}

func (s *spans) note(ctx context.Context, what string, args ...any) {
	span, _ := ctx.Value(spanKey{}).(string)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, strings.TrimSpace(fmt.Sprintf("%s %s %s", span, what, strings.TrimSpace(fmt.Sprintln(args...)))))
}

func (s *spans) trace() *smtprelay.Trace {
	return &smtprelay.Trace{
		SendStart: func(ctx context.Context, i smtprelay.SendStartInfo) context.Context {
			parent, _ := ctx.Value(spanKey{}).(string)
			return context.WithValue(ctx, spanKey{}, fmt.Sprint(parent, i.Name, i.Message.Tag))
		},
		SendDone: func(ctx context.Context, i smtprelay.SendDoneInfo) {
			s.note(ctx, "done", i.Name, i.Message.Tag, smtprelay.OutcomeOf(i.Err))
		},
		DialStart: func(ctx context.Context, i smtprelay.DialStartInfo) { s.note(ctx, "dial", i.Conn) },
		DialDone:  func(ctx context.Context, i smtprelay.DialDoneInfo) { s.note(ctx, "dialled", i.Conn, i.Err == nil) },
		GotConn:   func(ctx context.Context, i smtprelay.GotConnInfo) { s.note(ctx, "got", i.Conn) },
		Command:   func(ctx context.Context, i smtprelay.CommandInfo) { s.note(ctx, "command", i.Conn, i.Op) },
		Reply:     func(ctx context.Context, i smtprelay.ReplyInfo) { s.note(ctx, "reply", i.Conn, i.Op, i.Reply.Code) },
		Retry: func(ctx context.Context, i smtprelay.RetryInfo) {
			s.note(ctx, "retry", i.Attempt, i.Message.Tag)
		},
		ConnClosed: func(ctx context.Context, i smtprelay.ConnClosedInfo) { s.note(ctx, "closed", i.Conn, i.Reason) },
	}
}

func TestHooksOfASendGetTheContextOfItsStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS, s.NoAuth = true, true, true })
		var spans spans
		cfg := configOf(relay)
		cfg.Name, cfg.Trace, cfg.Pipelining = "bulk", spans.trace(), smtprelay.PipelineOff
		client := newClient(t, cfg)
		m := numbered(0)
		for m.Tag = range 2 {
			if _, err := client.Send(t.Context(), m); err != nil {
				t.Fatal(err)
			}
		}
		client.Close()
		want := strings.Split(`bulk0 dial 1
bulk0 reply 1 greeting 220
bulk0 command 1 ehlo
bulk0 reply 1 ehlo 250
bulk0 dialled 1 true
bulk0 got 1
bulk0 command 1 mail
bulk0 reply 1 mail 250
bulk0 command 1 rcpt
bulk0 reply 1 rcpt 250
bulk0 command 1 data
bulk0 reply 1 data 354
bulk0 command 1 end
bulk0 reply 1 end 250
bulk0 done bulk 0 accepted
bulk1 got 1
bulk1 command 1 mail
bulk1 reply 1 mail 250
bulk1 command 1 rcpt
bulk1 reply 1 rcpt 250
bulk1 command 1 data
bulk1 reply 1 data 354
bulk1 command 1 end
bulk1 reply 1 end 250
bulk1 done bulk 1 accepted`, "\n")
		got := slices.DeleteFunc(slices.Clone(spans.log), func(line string) bool { return !strings.HasPrefix(line, "bulk") })
		if !slices.Equal(got, want) {
			t.Errorf("got:\n%s", strings.Join(spans.log, "\n"))
		}
		for _, line := range []string{"command 1 quit", "closed 1 closed"} { // no Send's
			if !slices.Contains(spans.log, line) {
				t.Errorf("%s is not reported", line)
			}
		}
	})
}

func TestEndOfAMessageHasOneStepByDataAndInChunks(t *testing.T) {
	inBothModes(t, func(t *testing.T, near func(*smtptest.Server)) {
		var mu sync.Mutex
		replies := make(map[smtprelay.Op]int)
		relay := newRelay(t, near, func(s *smtptest.Server) { s.NoAuth = true })
		cfg := configOf(relay)
		cfg.Trace = &smtprelay.Trace{Reply: func(_ context.Context, r smtprelay.ReplyInfo) {
			mu.Lock()
			defer mu.Unlock()
			replies[r.Op] = r.Reply.Code
		}}
		client := newClient(t, cfg)
		for i := range 2 { // in chunks the first one begins with the probe for refused chunks
			if s := sendOne(t.Context(), client, i); s.err != nil {
				t.Fatal(s.err)
			}
		}
		client.Close()
		body := 354
		if relay.Chunking {
			body = 250
		}
		want(t, "the reply to DATA, or to a chunk", replies[smtprelay.OpData], body)
		want(t, "the reply to the end", replies[smtprelay.OpEnd], 250)
	})
}

func TestMultiTraceCallsAllAndPassesTheContextOn(t *testing.T) {
	var first, second spans
	trace := smtprelay.MultiTrace(first.trace(), nil, &smtprelay.Trace{}, &smtprelay.Trace{
		SendStart: func(context.Context, smtprelay.SendStartInfo) context.Context { return nil },
	}, second.trace())
	typ := reflect.TypeOf(*trace)
	for i := range typ.NumField() {
		if name := typ.Field(i).Name; name != "Learned" && reflect.ValueOf(*trace).Field(i).IsNil() {
			t.Errorf("%s is reported to no Trace", name)
		}
	}
	relay := newRelay(t)
	cfg := relay.Config()
	cfg.Name, cfg.Trace = "a", trace
	client := newClient(t, cfg)
	m := numbered(0)
	m.Tag = "7"
	if _, err := client.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	client.Close()
	if !slices.Equal(first.log, second.log) || !slices.Contains(first.log, "a7a7 done a 7 accepted") {
		t.Errorf("got %q and %q", first.log, second.log)
	}
}

func TestEveryInfoAboutAConnectionSaysWhichAndWhere(t *testing.T) {
	typ := reflect.TypeFor[smtprelay.Trace]()
	for i := range typ.NumField() {
		hook := typ.Field(i)
		info := hook.Type.In(1)
		if _, ok := info.FieldByName("Name"); !ok || info.Name() != hook.Name+"Info" {
			t.Errorf("%s gets a %s", hook.Name, info)
		}
		_, addr := info.FieldByName("Addr")
		_, conn := info.FieldByName("Conn")
		if ofSend := strings.HasPrefix(hook.Name, "Send") || hook.Name == "Retry" || hook.Name == "Learned"; !addr || !conn && !ofSend {
			t.Errorf("%s: Addr %t, Conn %t", info, addr, conn)
		}
	}
}

func TestLessonsAreReportedInOrderBeforeCloseReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, func(s *smtptest.Server) {
			s.InMemory, s.NoTLS, s.Chunking, s.MaxRecipients = true, true, true, 3
		})
		cfg := configOf(relay)
		cfg.Name = "bulk"
		var lessons []string
		cfg.Trace = &smtprelay.Trace{Learned: func(_ context.Context, i smtprelay.LearnedInfo) {
			time.Sleep(time.Second) // a slow hook delays only Close
			lessons = append(lessons, fmt.Sprint(i.Name, " ", i.Lesson, " ", i.Limit, " ", i.Text != "" && i.Addr == cfg.Addr))
		}}
		client := newClient(t, cfg)
		m := numbered(0)
		m.To = moreRecipients(6)
		began := time.Now()
		if _, err := client.Send(t.Context(), m); err != nil {
			t.Error(err)
		}
		want(t, "seconds that Send took", int(time.Since(began)/time.Second), 0)
		client.Close()
		if want := []string{"bulk chunks 0 true", "bulk max_recipients 3 true"}; !slices.Equal(lessons, want) {
			t.Errorf("got %q, want %q", lessons, want)
		}
	})
}

func TestEachLessonIsReported(t *testing.T) {
	for _, tt := range []struct {
		why   string
		relay func(*smtptest.Server)
		send  func(t *testing.T, client *smtprelay.Client)
		want  string
	}{
		{"recipients", func(s *smtptest.Server) { s.MaxRecipients = 3 }, func(t *testing.T, client *smtprelay.Client) {
			m := numbered(0)
			m.To = moreRecipients(6)
			if _, err := client.Send(t.Context(), m); err != nil {
				t.Error(err)
			}
		}, "max_recipients 3 0"},
		{"messages", func(s *smtptest.Server) { s.MaxMessages = 4 }, func(t *testing.T, client *smtprelay.Client) {
			for i := range 20 {
				if s := sendOne(t.Context(), client, i); s.err != nil {
					t.Error(s.err)
				}
			}
		}, "max_messages 4 0"},
		{"connections", func(s *smtptest.Server) { s.MaxConns, s.Delay = 2, 20*time.Millisecond }, func(t *testing.T, client *smtprelay.Client) {
			sendAtOnce(t.Context(), client, 0, 20)
		}, "max_conns 2 0"},
		{"credentials", func(s *smtptest.Server) {
			s.Fault(smtptest.Fault{At: smtptest.Auth, Reply: "535 5.7.8 no", Count: -1})
		}, func(t *testing.T, client *smtprelay.Client) {
			sendOne(t.Context(), client, 0)
		}, "bad_credentials 0 535"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				relay := newRelay(t, func(s *smtptest.Server) { s.InMemory, s.NoTLS = true, true }, tt.relay)
				cfg := configOf(relay)
				var lessons []string
				cfg.Trace = &smtprelay.Trace{Learned: func(_ context.Context, i smtprelay.LearnedInfo) {
					lessons = append(lessons, fmt.Sprint(i.Lesson, " ", i.Limit, " ", i.Reply.Code))
				}}
				client := newClient(t, cfg)
				tt.send(t, client)
				client.Close()
				if !slices.Contains(lessons, tt.want) {
					t.Errorf("got %q, want %q among them", lessons, tt.want)
				}
			})
		})
	}
}

func TestLogTraceLogsFailuresAsWarningsWithAttributes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged bytes.Buffer
		cfg := smtprelay.Config{Name: "bulk", Retry: smtprelay.Retry{MaxAttempts: 1}, Dial: relaytest.Dial(0, func(_ int, line string) string {
			switch {
			case line == "":
				return "220 relay"
			case strings.HasPrefix(line, "EHLO"):
				return "250 relay"
			case strings.HasPrefix(line, "MAIL"):
				return "451 4.3.0 not now"
			}
			return "250 ok"
		})}
		cfg.Trace = smtprelay.LogTrace(slog.New(slog.NewTextHandler(&logged, nil)))
		client := bubbleClient(t, cfg)
		client.Send(t.Context(), numbered(0))
		client.Close()
		line := ""
		for l := range strings.Lines(logged.String()) {
			if strings.Contains(l, `msg="smtp message failed"`) {
				line = l
			}
		}
		for _, attr := range []string{"level=WARN", "relay=bulk", "step=mail", `outcome="not accepted"`, "scope=message", "code=451", "attempts=1", "from=shop@example.com"} {
			if !strings.Contains(line, attr) {
				t.Errorf("%s is not in %q", attr, line)
			}
		}
	})
}

func TestStatsCountWaitsAsDatabaseSQLDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relay := newRelay(t, far)
		cfg := configOf(relay)
		cfg.Name, cfg.Limits.MaxConns, cfg.Pipelining = "bulk", 1, smtprelay.PipelineWithin
		client := newClient(t, cfg)
		sendOne(t.Context(), client, 0) // waits for its dial
		before := client.Stats()
		sendOne(t.Context(), client, 1) // finds the connection idle
		if after := client.Stats(); after.WaitCount != before.WaitCount || after.WaitDuration != before.WaitDuration || before.WaitCount != 1 || before.WaitDuration <= 0 {
			t.Errorf("one wait: %d, %v; then an idle connection: %d, %v", before.WaitCount, before.WaitDuration, after.WaitCount, after.WaitDuration)
		}
		sendAtOnce(t.Context(), client, 2, 3) // two of them wait
		if after := client.Stats(); after.WaitCount != 3 || after.Name != "bulk" {
			t.Errorf("%q: WaitCount %d, want 3", after.Name, after.WaitCount)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		relay.Fault(smtptest.Fault{At: smtptest.Mail, Stall: true})
		sendAtOnce(ctx, client, 5, 2) // one times out
		if after := client.Stats(); after.WaitCount != 4 {
			t.Errorf("WaitCount %d, want 4: a Send that gives up counts too", after.WaitCount)
		}
	})
}
