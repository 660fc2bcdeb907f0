// What Prometheus is told, read as it would read it, and what the dashboard asks for.
package promsmtprelay_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/promsmtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// run lets a Client called "news" succeed and fail at everything that is counted.
func run(t *testing.T) (*promsmtprelay.Metrics, *smtprelay.Client) {
	t.Helper()
	relay := smtptest.New(t)
	metrics := promsmtprelay.New()
	cfg := relay.Config()
	cfg.Name = "news"
	lost := make(chan struct{}, 10)
	cfg.Trace = smtprelay.MultiTrace(metrics.Trace(), &smtprelay.Trace{ConnClosed: func(_ context.Context, i smtprelay.ConnClosedInfo) {
		if i.Reason == "fault" && i.Messages > 0 {
			lost <- struct{}{}
		}
	}})
	client, err := smtprelay.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	metrics.Watch(client)
	send := func(to ...string) {
		t.Helper()
		_, _ = client.Send(context.Background(), smtprelay.Message{From: "a@secret.example", To: to, Body: smtprelay.Bytes([]byte("Subject: x\r\n\r\nx\r\n"))})
	}
	relay.Fault(smtptest.Fault{At: smtptest.Connect, Reply: "421 4.3.2 not now", Drop: true})
	relay.Fault(smtptest.Fault{At: smtptest.Rcpt, Rcpt: "gone@secret.example", Reply: "550 5.1.1 no gone@secret.example", Count: -1})
	send("ann@secret.example")
	send("ann@secret.example", "gone@secret.example")
	send("gone@secret.example")
	relay.Fault(smtptest.Fault{At: smtptest.Accepted, Drop: true})
	send("ann@secret.example")
	<-lost // it is counted by then

	cfg.Password = "wrong" // and of the same name
	wrong, err := smtprelay.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	metrics.Watch(wrong)
	_ = wrong.SendMail("a@secret.example", []string{"ann@secret.example"}, []byte("Subject: x\r\n\r\nx\r\n"))
	wrong.Close() // what is learnt has been told by then
	return metrics, client
}

func gather(t *testing.T, c prometheus.Collector) map[string]*dto.MetricFamily {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(c)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	byName := make(map[string]*dto.MetricFamily)
	for _, f := range families {
		byName[f.GetName()] = f
	}
	return byName
}

// value is that of the one metric whose labels are those, "" for none; of a histogram it is the count.
func value(t *testing.T, families map[string]*dto.MetricFamily, name, labels string) float64 {
	t.Helper()
	for _, m := range families["smtprelay_"+name].GetMetric() {
		var list []string
		for _, l := range m.GetLabel() {
			list = append(list, l.GetName()+"="+l.GetValue())
		}
		if strings.Join(list, ",") == labels {
			return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	t.Errorf("no %s{%s}", name, labels)
	return -1
}

func TestEveryCountIsThatOfTheClient(t *testing.T) {
	metrics, client := run(t)
	client.Close()
	got := gather(t, metrics)
	s := client.Stats()
	for _, c := range []struct {
		name, labels string
		want         float64
	}{
		{"messages_total", "client=news,outcome=accepted", 2},
		{"messages_total", "client=news,outcome=not_accepted", 2},
		{"messages_total", "client=news,outcome=unknown", 1},
		{"recipients_refused_total", "client=news", 2},
		{"connections", "client=news,state=idle", 0},
		{"connections", "client=news,state=used", 0},
		{"connections_limit", "client=news", 20},
		{"waiting_sends", "client=news", 0},
		{"retries_total", "client=news", float64(s.Retries)},
		{"overlapped_total", "client=news", float64(s.Overlapped)},
		{"dials_total", "client=news,result=ok", 1},
		{"dials_total", "client=news,result=failed", 2},
		{"auths_total", "client=news,result=ok", 1},
		{"auths_total", "client=news,result=failed", 1},
		{"connections_closed_total", "client=news,reason=full", 0},
		{"connections_closed_total", "client=news,reason=age", 0},
		{"connections_closed_total", "client=news,reason=idle", 0},
		{"connections_closed_total", "client=news,reason=fault", float64(s.ClosedFaulty)},
		{"send_duration_seconds", "client=news,outcome=accepted", 2},
		{"send_duration_seconds", "client=news,outcome=not_accepted", 2},
		{"send_duration_seconds", "client=news,outcome=unknown", 1},
		{"dial_duration_seconds", "client=news,result=failed", 2},
		{"dial_duration_seconds", "client=news,result=ok", 1},
		{"errors_total", "client=news,code=550,step=rcpt", 2},
		{"errors_total", "client=news,code=,step=end", 1},
		{"errors_total", "client=news,code=535,step=auth", 1},
		{"lessons_total", "client=news,lesson=bad_credentials", 1},
	} {
		if v := value(t, got, c.name, c.labels); v != c.want {
			t.Errorf("%s{%s} is %v, want %v", c.name, c.labels, v, c.want)
		}
	}
	for _, name := range []string{"wait_duration_seconds", "waits_total", "wait_seconds_total"} {
		if value(t, got, name, "client=news") <= 0 {
			t.Errorf("%s is not counted", name)
		}
	}
}

func TestPromlintHasNothingToSay(t *testing.T) {
	metrics, _ := run(t)
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(metrics)
	problems, err := testutil.GatherAndLint(registry)
	if err != nil || len(problems) > 0 {
		t.Error(err, problems)
	}
}

func TestNoLabelHasAnAddressOrTheRelaysWords(t *testing.T) {
	metrics, _ := run(t)
	if all := fmt.Sprint(gather(t, metrics)); strings.Contains(all, "secret") || strings.Contains(all, "@") {
		t.Error(all)
	}
}

func TestEveryFieldOfStatsIsCollectedAndAddedUpForClientsOfOneName(t *testing.T) {
	metrics, client := run(t)
	before := gather(t, metrics)
	metrics.Watch(client, client) // what it has counted, twice more
	after := gather(t, metrics)
	for name, labels := range map[string]string{"messages_total": "client=news,outcome=accepted", "recipients_refused_total": "client=news",
		"connections_limit": "client=news", "waits_total": "client=news", "wait_seconds_total": "client=news",
		"dials_total": "client=news,result=ok", "auths_total": "client=news,result=ok", "connections_closed_total": "client=news,reason=fault"} {
		if a, b := value(t, before, name, labels), value(t, after, name, labels); b <= a || a == 0 {
			t.Errorf("%s is %v for two and %v for four", name, a, b)
		}
	}
	if n := reflect.TypeFor[smtprelay.Stats]().NumField(); n != 21 {
		t.Errorf("Stats has %d fields: collect the new one, add it up, and say so here", n)
	}
}

func TestDocNamesEveryMetric(t *testing.T) {
	metrics, client := run(t)
	client.Close()
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`(?m)^//\t(smtprelay_\w+)`).FindAllStringSubmatch(string(doc), -1)
	var names []string
	for _, n := range named {
		names = append(names, n[1])
	}
	got := gather(t, metrics)
	for name := range got {
		if !slices.Contains(names, name) {
			t.Errorf("doc.go does not name %s", name)
		}
	}
	for _, name := range names {
		if got[name] == nil {
			t.Errorf("doc.go names %s, which there is not", name)
		}
	}
}

type dashboard struct {
	Title         string
	UID           string
	SchemaVersion int
	Templating    struct {
		List []struct{ Name, Type string }
	}
	Panels []panel
}

type panel struct {
	ID         int
	Title      string
	Type       string
	Datasource struct{ Type, UID string }
	GridPos    struct{ H, W, X, Y int }
	Targets    []struct{ Expr, RefID, LegendFormat string }
}

func TestDashboardAsksOnlyForWhatThereIsAndForAllOfIt(t *testing.T) {
	text, err := os.ReadFile("grafana/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	if d.Title == "" || d.UID == "" || d.SchemaVersion < 36 || len(d.Panels) == 0 {
		t.Errorf("title %q, uid %q, schemaVersion %d, %d panels", d.Title, d.UID, d.SchemaVersion, len(d.Panels))
	}
	var variables []string
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name)
	}
	metrics, client := run(t)
	client.Close()
	families := gather(t, metrics)
	series := map[string][]string{} // name to labels
	for name, f := range families {
		labels := []string{}
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		if f.GetType() == dto.MetricType_HISTOGRAM {
			series[name+"_bucket"] = append(labels, "le")
			series[name+"_sum"], series[name+"_count"] = labels, labels
		} else {
			series[name] = labels
		}
	}
	asked := map[string]bool{}
	used := map[int]bool{}
	cells := map[[2]int]string{}
	for _, p := range d.Panels {
		if used[p.ID] || p.ID == 0 || p.Title == "" {
			t.Errorf("panel %q has the id %d", p.Title, p.ID)
		}
		used[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if at := [2]int{x, y}; cells[at] != "" || x > 23 {
					t.Errorf("panels %q and %q overlap", p.Title, cells[at])
				} else {
					cells[at] = p.Title
				}
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Datasource.Type != "prometheus" || p.Datasource.UID != "${datasource}" || !slices.Contains(variables, "datasource") {
			t.Errorf("panel %q has the data source %+v", p.Title, p.Datasource)
		}
		if len(p.Targets) == 0 {
			t.Errorf("panel %q asks for nothing", p.Title)
		}
		for _, target := range p.Targets {
			checkExpr(t, p.Title, target.Expr, series, variables)
			for _, name := range metricName.FindAllString(target.Expr, -1) {
				asked[strings.NewReplacer("_bucket", "", "_sum", "", "_count", "").Replace(name)] = true
			}
			for _, l := range regexp.MustCompile(`{{(\w+)}}`).FindAllStringSubmatch(target.LegendFormat, -1) {
				if !strings.Contains(target.Expr, l[1]) {
					t.Errorf("panel %q: the legend has %s, which the query does not keep", p.Title, l[1])
				}
			}
		}
	}
	for name := range families {
		if !asked[name] {
			t.Errorf("no panel shows %s", name)
		}
	}
}

var metricName = regexp.MustCompile(`smtprelay_\w+`)

// checkExpr checks that a query's series, labels and variables exist and that its brackets match.
func checkExpr(t *testing.T, title, expr string, series map[string][]string, variables []string) {
	t.Helper()
	names := metricName.FindAllString(expr, -1)
	if len(names) == 0 {
		t.Errorf("panel %q: no metric in %q", title, expr)
	}
	var labels []string
	for _, name := range names {
		if series[name] == nil {
			t.Errorf("panel %q asks for %s, which there is not", title, name)
		}
		labels = append(labels, series[name]...)
	}
	for _, group := range regexp.MustCompile(`by \(([^)]*)\)`).FindAllStringSubmatch(expr, -1) {
		for _, label := range strings.Split(group[1], ",") {
			if !slices.Contains(labels, strings.TrimSpace(label)) {
				t.Errorf("panel %q groups by %q, which there is not", title, label)
			}
		}
	}
	for _, label := range regexp.MustCompile(`(\w+)(?:=~|!=|=)"`).FindAllStringSubmatch(expr, -1) {
		if !slices.Contains(labels, label[1]) {
			t.Errorf("panel %q selects by %q, which there is not", title, label[1])
		}
	}
	for _, v := range regexp.MustCompile(`\$(\w+)`).FindAllStringSubmatch(expr, -1) {
		if !slices.Contains(append(variables, "__rate_interval"), v[1]) {
			t.Errorf("panel %q uses $%s, which there is not", title, v[1])
		}
	}
	for _, pair := range []string{"()", "{}", "[]"} {
		if strings.Count(expr, pair[:1]) != strings.Count(expr, pair[1:]) {
			t.Errorf("panel %q: %s do not match in %q", title, pair, expr)
		}
	}
}
