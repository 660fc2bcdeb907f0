// What a Trace and Observe tell OpenTelemetry, read back with the SDK's in-memory exporters: spans, events, metrics, and what
// must not leave.
package otelsmtprelay_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/otelsmtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// lab is a relay, a Client with a Trace, and what the Trace has told.
type lab struct {
	relay  *smtptest.Server
	client *smtprelay.Client
	spans  *tracetest.InMemoryExporter
	reader *sdkmetric.ManualReader
	tracer trace.Tracer
}

func newLab(t *testing.T, relay *smtptest.Server, opts ...otelsmtprelay.Option) *lab {
	t.Helper()
	l := &lab{relay: relay, spans: tracetest.NewInMemoryExporter(), reader: sdkmetric.NewManualReader()}
	tracers := sdktrace.NewTracerProvider(sdktrace.WithSyncer(l.spans))
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(l.reader))
	l.tracer = tracers.Tracer("test")
	opts = append(opts, otelsmtprelay.WithTracerProvider(tracers), otelsmtprelay.WithMeterProvider(meters))
	cfg := relay.Config()
	cfg.Name = "news"
	cfg.Trace = otelsmtprelay.NewTrace(opts...)
	var err error
	if l.client, err = smtprelay.New(cfg); err != nil {
		t.Fatal(err)
	}
	reg, err := otelsmtprelay.Observe(l.client, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := reg.Unregister(); err != nil {
			t.Error(err)
		}
		l.client.Close()
	})
	return l
}

func (l *lab) send(ctx context.Context, to ...string) error {
	_, err := l.client.Send(ctx, smtprelay.Message{
		From: "shop@secret.example", To: to, Body: smtprelay.Bytes([]byte("Subject: hush\r\n\r\nnobody's business\r\n"))})
	return err
}

// span is the only span of that name.
func (l *lab) span(t *testing.T, name string) tracetest.SpanStub {
	t.Helper()
	var found []tracetest.SpanStub
	for _, s := range l.spans.GetSpans() {
		if s.Name == name {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d spans %q, want 1", len(found), name)
	}
	return found[0]
}

func text(attrs []attribute.KeyValue) string {
	var list []string
	for _, a := range attrs {
		list = append(list, string(a.Key)+"="+a.Value.String())
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

func (l *lab) has(t *testing.T, got []attribute.KeyValue, want ...string) {
	t.Helper()
	host, port, _ := strings.Cut(l.relay.Addr(), ":")
	for _, w := range append(want, "server.address="+host, "server.port="+port, "network.protocol.name=smtp", "smtprelay.name=news") {
		if !strings.Contains(" "+text(got)+" ", " "+w+" ") {
			t.Errorf("no %s in %s", w, text(got))
		}
	}
}

func events(s tracetest.SpanStub) (list []string) {
	for _, e := range s.Events {
		about := strings.TrimPrefix(e.Name, "smtprelay.")
		for _, a := range e.Attributes {
			if a.Key == "smtprelay.step" || a.Key == "smtprelay.reply.code" || a.Key == "error.type" {
				about += " " + a.Value.String()
			}
		}
		list = append(list, about)
	}
	return list
}

// points are all points of all metrics, each "name{attributes} value" without the server's.
func (l *lab) points(t *testing.T) (list []string) {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := l.reader.Collect(context.Background(), &rm); err != nil {
		t.Fatal(err)
	}
	add := func(name string, set attribute.Set, value any) {
		attrs := set.ToSlice()
		attrs = slices.DeleteFunc(attrs, func(a attribute.KeyValue) bool {
			return a.Key == "server.address" || a.Key == "server.port" || a.Key == "smtprelay.name"
		})
		list = append(list, fmt.Sprintf("%s{%s} %v", strings.TrimPrefix(name, "smtprelay."), strings.ReplaceAll(text(attrs), "smtprelay.", ""), value))
	}
	for _, scope := range rm.ScopeMetrics {
		for _, m := range scope.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range data.DataPoints {
					add(m.Name, p.Attributes, p.Value)
				}
			case metricdata.Gauge[int64]:
				for _, p := range data.DataPoints {
					add(m.Name, p.Attributes, p.Value)
				}
			case metricdata.Histogram[float64]:
				for _, p := range data.DataPoints {
					if p.Count > 0 && p.Sum < 0 {
						t.Errorf("%s has a negative sum", m.Name)
					}
					add(m.Name, p.Attributes, p.Count)
				}
			default:
				t.Errorf("%s is a %T", m.Name, m.Data)
			}
		}
	}
	slices.Sort(list)
	return list
}

func TestSendIsAClientSpanUnderTheCallersWithItsStepsAsEvents(t *testing.T) {
	l := newLab(t, smtptest.New(t))
	ctx, root := l.tracer.Start(context.Background(), "order")
	if err := l.send(ctx, "ann@example.org", "bob@example.org"); err != nil {
		t.Fatal(err)
	}
	root.End()
	send := l.span(t, "smtp send")
	if send.SpanKind != trace.SpanKindClient || send.Parent.SpanID() != root.SpanContext().SpanID() || send.Status.Code != codes.Unset {
		t.Errorf("kind %v, parent %v, status %v", send.SpanKind, send.Parent.SpanID(), send.Status)
	}
	l.has(t, send.Attributes, "smtprelay.outcome=accepted", "smtprelay.reply.code=250", "smtprelay.recipient.count=2",
		"smtprelay.queue_id="+l.relay.Messages()[0].ID)
	// EHLO comes twice, for STARTTLS; the accepted recipients are not told.
	want := "reply 220 greeting,reply 250 ehlo,reply 220 starttls,reply 250 ehlo,reply 235 auth,connection,reply 250 mail,reply 354 data,reply 250 end"
	if got := strings.Join(events(send), ","); got != want {
		t.Errorf("events\n got %s\nwant %s", got, want)
	}
	connect := l.span(t, "smtp connect")
	if connect.Parent.SpanID() != send.SpanContext.SpanID() {
		t.Error("the connection's span is not under that of the Send which it was begun for")
	}
	l.has(t, connect.Attributes, "smtprelay.connection.id=1", "tls.protocol.version=1.3", "tls.resumed=false")
	if connect.EndTime.Before(connect.StartTime) || connect.StartTime.Before(send.StartTime.Add(-1e6)) {
		t.Errorf("the connection took from %v to %v, and the Send began at %v", connect.StartTime, connect.EndTime, send.StartTime)
	}
}

func TestRefusalIsAnErrorWithTheCodeAsItsType(t *testing.T) {
	l := newLab(t, smtptest.New(t))
	l.relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Reply: "550 5.1.1 no ann@example.org here"})
	if err := l.send(context.Background(), "ann@example.org"); err == nil {
		t.Fatal("accepted")
	}
	send := l.span(t, "smtp send")
	l.has(t, send.Attributes, "smtprelay.outcome=not_accepted", "error.type=550", "smtprelay.step=rcpt", "smtprelay.scope=recipient",
		"smtprelay.reply.code=550", "smtprelay.reply.enhanced_code=5.1.1", "smtprelay.attempts=1", "smtprelay.recipient.missed=1")
	if send.Status.Code != codes.Error || send.Status.Description != "rcpt: 550" {
		t.Errorf("status %+v", send.Status)
	}
	if !slices.Contains(events(send), "reply 550 rcpt") {
		t.Errorf("the refused recipient is no event: %v", events(send))
	}
}

func TestLostConnectionIsAnErrorWithTheStepAsItsType(t *testing.T) {
	l := newLab(t, smtptest.New(t))
	l.relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true})
	if err := l.send(context.Background(), "ann@example.org"); smtprelay.OutcomeOf(err) != smtprelay.Unknown {
		t.Fatal(err)
	}
	l.has(t, l.span(t, "smtp send").Attributes, "smtprelay.outcome=unknown", "error.type=end")
}

func TestRetryAndFailedDialAreTold(t *testing.T) {
	l := newLab(t, smtptest.New(t))
	l.relay.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "421 4.3.2 not now", Drop: true})
	l.relay.Fault(smtptest.Fault{At: smtptest.Data, Drop: true})
	if err := l.send(context.Background(), "ann@example.org"); err != nil {
		t.Fatal(err)
	}
	if got := events(l.span(t, "smtp send")); !slices.ContainsFunc(got, func(e string) bool { return strings.HasPrefix(e, "retry") }) {
		t.Errorf("no retry in %v", got)
	}
	var failed int
	for _, s := range l.spans.GetSpans() {
		if s.Name == "smtp connect" && s.Status.Code == codes.Error {
			failed++
			l.has(t, s.Attributes, "error.type=421", "smtprelay.step=greeting")
		}
	}
	if failed != 1 {
		t.Errorf("%d connections failed, want 1", failed)
	}
	got := l.points(t)
	for _, want := range []string{"connect.duration{error.type=421} 1", "connect.duration{} 2", "connection.closed{close.reason=fault} 1", "messages{outcome=accepted} 1"} {
		if !slices.Contains(got, want) {
			t.Errorf("no %s in %v", want, got)
		}
	}
	if !slices.ContainsFunc(got, func(p string) bool { return strings.HasPrefix(p, "retries{error.type=") }) {
		t.Errorf("no retries in %v", got)
	}
}

func TestMetricsCountMessagesRecipientsAndConnections(t *testing.T) {
	l := newLab(t, smtptest.New(t))
	l.relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "gone@example.org", Reply: "550 5.1.1 gone", Count: -1})
	for _, to := range [][]string{{"ann@example.org"}, {"ann@example.org", "gone@example.org"}, {"gone@example.org"}} {
		_ = l.send(context.Background(), to...)
	}
	got := l.points(t)
	for _, want := range []string{
		"messages{outcome=accepted} 1", "messages{error.type=550 outcome=accepted} 1", "messages{error.type=550 outcome=not_accepted} 1",
		"recipients{outcome=accepted} 2", "recipients{outcome=not_accepted} 2",
		"send.duration{outcome=accepted} 2", "send.duration{outcome=not_accepted} 1",
		"connections{connection.state=idle} 1", "connections{connection.state=used} 0", "connections.max{} 10", "waiting{} 0",
	} {
		if !slices.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, strings.Join(got, "\n"))
		}
	}
	if !slices.ContainsFunc(got, func(p string) bool { return strings.HasPrefix(p, "wait.duration{}") }) {
		t.Error("no wait.duration")
	}
}

func TestRefusedCredentialsAreALesson(t *testing.T) {
	l := newLab(t, smtptest.New(t))
	l.relay.Fault(smtptest.Fault{At: smtptest.Auth, Reply: "535 5.7.8 no"})
	if err := l.client.Ping(context.Background()); err == nil {
		t.Fatal("accepted")
	}
	l.client.Close() // by then lessons have been told
	for _, want := range []string{"lessons{lesson=bad_credentials} 1", "connect.duration{error.type=535} 1"} {
		if got := l.points(t); !slices.Contains(got, want) {
			t.Errorf("no %s in %v", want, got)
		}
	}
}

// everything is all that left, as text.
func (l *lab) everything(t *testing.T) string {
	var b strings.Builder
	for _, s := range l.spans.GetSpans() {
		fmt.Fprintln(&b, s.Name, text(s.Attributes), s.Status.Description)
		for _, e := range s.Events {
			fmt.Fprintln(&b, e.Name, text(e.Attributes))
		}
	}
	fmt.Fprintln(&b, l.points(t))
	return b.String()
}

func TestAddressesAndTheRelaysWordsLeaveOnlyIfAskedFor(t *testing.T) {
	for _, asked := range []bool{false, true} {
		t.Run(fmt.Sprint("asked=", asked), func(t *testing.T) {
			var opts []otelsmtprelay.Option
			if asked {
				opts = append(opts, otelsmtprelay.WithAddresses())
			}
			l := newLab(t, smtptest.New(t), opts...)
			l.relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "ann@private.example", Reply: "550 5.1.1 no ann@private.example here"})
			l.relay.Fault(smtptest.Fault{At: smtptest.Mail, AfterMessages: 1, Reply: "421 4.7.0 bye shop@secret.example", Drop: true})
			_ = l.send(context.Background(), "ann@private.example")
			_ = l.send(context.Background(), "bob@private.example")
			_ = l.send(context.Background(), "bob@private.example")
			all := l.everything(t)
			for _, words := range []string{"private.example", "secret.example"} {
				if strings.Contains(all, words) != asked {
					t.Errorf("%q is in what has left: %v\n%s", words, !asked, all)
				}
			}
			for _, never := range []string{"hush", "business", l.relay.Password} {
				if strings.Contains(all, never) {
					t.Errorf("%q has left", never)
				}
			}
		})
	}
}

func TestEventsOfAPingAreNotTheCallersSpans(t *testing.T) {
	l := newLab(t, smtptest.New(t))
	ctx, root := l.tracer.Start(context.Background(), "readiness")
	if err := l.client.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	root.End()
	if e := l.span(t, "readiness").Events; len(e) > 0 {
		t.Errorf("the caller's span has got events: %v", e)
	}
	if l.span(t, "smtp connect").Parent.SpanID() != root.SpanContext().SpanID() {
		t.Error("the connection's span is not under the caller's")
	}
}

func TestOneTraceServesSeveralClientsAndOthersBeside(t *testing.T) {
	l := newLab(t, smtptest.New(t))
	var seen int
	cfg := l.relay.Config()
	spans := tracetest.NewInMemoryExporter()
	cfg.Trace = smtprelay.MultiTrace(
		otelsmtprelay.NewTrace(otelsmtprelay.WithTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans)))),
		&smtprelay.Trace{SendDone: func(ctx context.Context, _ smtprelay.SendDoneInfo) {
			if trace.SpanContextFromContext(ctx).IsValid() {
				seen++
			}
		}})
	client, err := smtprelay.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	err = client.SendMail("a@example.com", []string{"b@example.com"}, []byte("Subject: x\r\n\r\nx\r\n"))
	if err != nil || seen != 1 || len(spans.GetSpans()) != 2 {
		t.Errorf("error %v, %d contexts with a span, %d spans", err, seen, len(spans.GetSpans()))
	}
}

func TestErrorsOfOthersHaveTheTypeOther(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	tr := otelsmtprelay.NewTrace(otelsmtprelay.WithTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))))
	ctx := tr.SendStart(context.Background(), smtprelay.SendStartInfo{Addr: "nonsense"})
	tr.SendDone(ctx, smtprelay.SendDoneInfo{Addr: "nonsense", Err: errors.New("odd")})
	if got := text(spans.GetSpans()[0].Attributes); !strings.Contains(got, "error.type=_OTHER") || !strings.Contains(got, "server.address=nonsense") {
		t.Error(got)
	}
}

func BenchmarkSend(b *testing.B) {
	for _, with := range []bool{false, true} {
		b.Run(map[bool]string{false: "without", true: "with"}[with], func(b *testing.B) {
			relay := smtptest.NewUnstartedServer()
			relay.MaxMessages, relay.DropBodies = -1, true
			relay.Start()
			defer relay.Close()
			cfg := relay.Config()
			cfg.Limits.MaxMessagesPerConn = smtprelay.NoLimit
			if with {
				cfg.Trace = otelsmtprelay.NewTrace(otelsmtprelay.WithTracerProvider(sdktrace.NewTracerProvider()),
					otelsmtprelay.WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))))
			}
			client, err := smtprelay.New(cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer client.Close()
			body := []byte("Subject: x\r\n\r\nx\r\n")
			b.ReportAllocs()
			for b.Loop() {
				if err := client.SendMail("a@example.com", []string{"b@example.com"}, body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
