package smtpapi_test

// What Check refuses: a test for each limit of SendGrid's pages, at the limit and one beyond.

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay/smtpapi"
)

func addresses(n int) []string {
	to := make([]string, n)
	for i := range to {
		to[i] = fmt.Sprintf("user%d@example.org", i)
	}
	return to
}

// chain makes substitutions of which n are nested in each other.
func chain(n int) map[string][]string {
	sub := map[string][]string{fmt.Sprintf("-%d-", n): {"the end"}}
	for i := range n {
		sub[fmt.Sprintf("-%d-", i)] = []string{fmt.Sprintf("see -%d-", i+1)}
	}
	return sub
}

func TestCheckRefusesWhatIsBeyondALimit(t *testing.T) {
	type filters = smtpapi.Filters
	x := strings.Repeat
	other := func(name string, settings map[string]any) smtpapi.Header {
		return smtpapi.Header{Filters: filters{Other: map[string]map[string]any{name: settings}}}
	}
	split := func(n int) map[string][]string { // n bytes of tags and values for one recipient
		sub := make(map[string][]string)
		for i := 0; n > 0; i++ {
			size := min(n, 900)
			sub[fmt.Sprintf("-%03d-", i)] = []string{x("x", size-5)}
			n -= size
		}
		return sub
	}
	args := func(n int) map[string]string {
		m := make(map[string]string)
		for i := 0; n > 0; i++ {
			size := min(n, 500)
			m[fmt.Sprintf("%03d", i)] = x("x", size-3)
			n -= size
		}
		return m
	}
	to2 := addresses(2)
	for _, test := range []struct {
		name      string
		good, bad smtpapi.Header
		want      string
	}{
		{"addresses", smtpapi.Header{To: addresses(10_000)}, smtpapi.Header{To: addresses(10_001)},
			"to: 10001 addresses, more than 10,000"},
		{"empty address", smtpapi.Header{To: to2}, smtpapi.Header{To: []string{"a@x.example", ""}}, "to[1]: empty"},
		{"address without @", smtpapi.Header{}, smtpapi.Header{To: []string{"ann", "bob"}}, "to[0]: an address without @ (and 1 more)"},
		{"control character in an address", smtpapi.Header{}, smtpapi.Header{To: []string{"a@x\r\n"}},
			"to[0]: an address with a control character"},
		{"values per address", smtpapi.Header{To: to2, Sub: map[string][]string{"-n-": {"a", "b"}}},
			smtpapi.Header{To: to2, Sub: map[string][]string{"-n-": {"a"}}}, `sub "-n-" has 1 values and to 2: want one for each recipient`},
		{"values without to", smtpapi.Header{Sub: map[string][]string{"-m-": {"a", "b"}, "-n-": {"a", "b"}}},
			smtpapi.Header{Sub: map[string][]string{"-m-": {"a", "b"}, "-n-": {"a"}}}, `sub "-n-" has 1 values and sub "-m-" 2: want one for each recipient`},
		{"no values", smtpapi.Header{}, smtpapi.Header{Sub: map[string][]string{"-m-": {}}}, `sub "-m-" has no values: want one for each recipient`},
		{"bytes of substitutions", smtpapi.Header{Sub: split(50_000)}, smtpapi.Header{Sub: split(50_001)},
			"sub: recipient[0]: more than 50,000 bytes of tags and values for one recipient"},
		{"space in a tag", smtpapi.Header{}, smtpapi.Header{Sub: map[string][]string{"-first name-": {"a"}}}, `sub "-first name-": white space in the tag`},
		{"empty tag", smtpapi.Header{}, smtpapi.Header{Sub: map[string][]string{"": {"a"}}}, "sub: a tag is empty"},
		{"nesting", smtpapi.Header{Sub: chain(4)}, smtpapi.Header{Sub: chain(5)},
			`sub: recipient[0]: more than 4 substitutions nested, from tag "-0-" on`},
		{"endless nesting", smtpapi.Header{}, smtpapi.Header{Sub: map[string][]string{"-a-": {"-b-"}, "-b-": {"-a-"}}},
			`sub: recipient[0]: more than 4 substitutions nested, from tag "-a-" on`},
		{"section outside of sub", smtpapi.Header{Section: map[string]string{":s": "x"}, Sub: map[string][]string{"-t-": {":s"}}},
			smtpapi.Header{Section: map[string]string{":s": "x"}}, `section ":s": in no value of sub, so that it is never replaced`},
		{"section in a section", smtpapi.Header{},
			smtpapi.Header{Section: map[string]string{":a": "x", ":b": ":a"}, Sub: map[string][]string{"-t-": {":a :b"}}},
			`section ":b": contains section ":a", which is then not replaced`},
		{"space in a section's tag", smtpapi.Header{},
			smtpapi.Header{Section: map[string]string{": a": "x"}, Sub: map[string][]string{"-t-": {": a"}}}, `section ": a": white space in the tag`},
		{"categories", smtpapi.Header{Category: strings.Split("0123456789", "")}, smtpapi.Header{Category: strings.Split("0123456789a", "")},
			"category: 11 categories, more than 10"},
		{"category in ASCII", smtpapi.Header{Category: []string{"cafe"}}, smtpapi.Header{Category: []string{"café"}}, "category[0]: not US-ASCII"},
		{"empty category", smtpapi.Header{}, smtpapi.Header{Category: []string{""}}, "category[0]: empty"},
		{"bytes of unique arguments", smtpapi.Header{UniqueArgs: args(10_000)}, smtpapi.Header{UniqueArgs: args(10_004)},
			"unique_args: 10004 bytes of names and values, more than 10,000"},
		{"both times", smtpapi.Header{SendAt: time.Now()}, smtpapi.Header{SendAt: time.Now(), SendEachAt: []time.Time{time.Now()}},
			"send_at and send_each_at are both set: SendGrid drops such a message"},
		{"times per address", smtpapi.Header{To: to2, SendEachAt: []time.Time{time.Now(), time.Now()}},
			smtpapi.Header{To: to2, SendEachAt: []time.Time{time.Now()}}, "send_each_at has 1 values and to 2: want one for each recipient"},
		{"time before Unix time", smtpapi.Header{SendAt: time.Unix(1, 0)}, smtpapi.Header{SendAt: time.Unix(0, 0).UTC()},
			"send_at: 1970-01-01T00:00:00Z is not after 1970"},
		{"zero time for one", smtpapi.Header{}, smtpapi.Header{SendEachAt: []time.Time{{}}}, "send_each_at[0]: not after 1970"},
		{"groups to display", smtpapi.Header{ASMGroupsToDisplay: repeat(7, 25)}, smtpapi.Header{ASMGroupsToDisplay: repeat(7, 26)},
			"asm_groups_to_display: 26 groups, more than 25"},
		{"group to display", smtpapi.Header{}, smtpapi.Header{ASMGroupsToDisplay: []int{1, 0}}, "asm_groups_to_display[1]: not a group's ID"},
		{"group", smtpapi.Header{ASMGroupID: 1}, smtpapi.Header{ASMGroupID: -1}, "asm_group_id: -1 is negative"},
		{"filter in lower case", other("new", map[string]any{"enable": 1}), other("New", map[string]any{"enable": 1}), `filters "New": the name is not in lower case`},
		{"setting in lower case", smtpapi.Header{}, other("new", map[string]any{"Enable": 1}), `filters "new": setting "Enable" is empty or not in lower case`},
		{"filter without a name", smtpapi.Header{}, other("", nil), "filters: a name is empty"},
		{"filter with a field", smtpapi.Header{}, other("dkim", nil), `filters "dkim": set the field of Filters, not Other`},
		{"removed filter bcc", smtpapi.Header{}, other("bcc", nil), `filters "bcc": SendGrid has removed it`},
		{"removed filter spamcheck", smtpapi.Header{}, other("spamcheck", nil), `filters "spamcheck": SendGrid has removed it`},
		{"enable", other("new", map[string]any{"enable": 0.0}), other("new", map[string]any{"enable": 2}), `filters "new": enable is "2": want 0 or 1`},
		{"enable as a truth", smtpapi.Header{}, other("new", map[string]any{"enable": true}), `filters "new": enable is "true": want 0 or 1`},
		{"type of a setting", other("new", map[string]any{"a": "x", "b": true, "c": int64(1), "d": 0.5}), other("new", map[string]any{"a": []string{"x"}}),
			`filters "new": "a" is a []string: want string, bool, int, int64 or float64`},
		{"number of a setting", smtpapi.Header{}, other("new", map[string]any{"a": math.Inf(1)}), `filters "new": "a" is +Inf, which JSON does not have`},
		{"dkim", smtpapi.Header{Filters: filters{DKIM: &smtpapi.DKIM{UseFrom: true}}}, smtpapi.Header{Filters: filters{DKIM: &smtpapi.DKIM{}}},
			"filters dkim: neither domain nor use_from is set"},
		{"footer", smtpapi.Header{Filters: filters{Footer: &smtpapi.Footer{}}}, smtpapi.Header{Filters: filters{Footer: &smtpapi.Footer{Enable: true}}},
			"filters footer: enabled without a text"},
		{"ganalytics", smtpapi.Header{Filters: filters{GAnalytics: &smtpapi.GAnalytics{Enable: true, Term: "x"}}},
			smtpapi.Header{Filters: filters{GAnalytics: &smtpapi.GAnalytics{Enable: true}}}, "filters ganalytics: enabled without a parameter"},
		{"subscriptiontrack", smtpapi.Header{Filters: filters{SubscriptionTrack: &smtpapi.SubscriptionTrack{Enable: true, Replace: "[u]"}}},
			smtpapi.Header{Filters: filters{SubscriptionTrack: &smtpapi.SubscriptionTrack{Enable: true}}},
			"filters subscriptiontrack: enabled without replace or a text"},
		{"templates", smtpapi.Header{Filters: filters{Templates: &smtpapi.Templates{Enable: true, TemplateID: "d-1"}}},
			smtpapi.Header{Filters: filters{Templates: &smtpapi.Templates{Enable: true}}}, "filters templates: enabled without template_id"},
		{"template", smtpapi.Header{Filters: filters{Template: &smtpapi.Template{Enable: true, HTML: "<p><% body %>"}}},
			smtpapi.Header{Filters: filters{Template: &smtpapi.Template{Enable: true, HTML: "<p>"}}},
			"filters template: enabled without <% body %> in its HTML"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := test.good.Check(); err != nil {
				t.Errorf("within the limit: %v", err)
			}
			err := test.bad.Check()
			if want := "smtpapi: " + test.want; err == nil || err.Error() != want {
				t.Errorf("beyond the limit: got %v, want %s", err, want)
			}
			if b, err := test.bad.AppendTo([]byte("x")); err == nil || string(b) != "x" {
				t.Errorf("AppendTo: got %q, %v", b, err)
			}
		})
	}
}

func repeat(n, times int) []int {
	s := make([]int, times)
	for i := range s {
		s[i] = n
	}
	return s
}

func TestCheckAllowsSeventyTwoHours(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		latest := time.Now().Add(72 * time.Hour)
		late := latest.Add(time.Second)
		for _, h := range []smtpapi.Header{{SendAt: latest}, {SendEachAt: []time.Time{latest, latest}}} {
			if err := h.Check(); err != nil {
				t.Error(err)
			}
		}
		check(t, smtpapi.Header{SendAt: late}, "smtpapi: send_at: "+late.Format(time.RFC3339)+" is more than 72 hours ahead")
		check(t, smtpapi.Header{SendEachAt: []time.Time{latest, late, late}}, "smtpapi: send_each_at[1]: more than 72 hours ahead (and 1 more)")
		time.Sleep(time.Second)
		if err := (smtpapi.Header{SendAt: late}).Check(); err != nil {
			t.Error("a second later:", err)
		}
	})
}

func check(t *testing.T, h smtpapi.Header, want string) {
	t.Helper()
	if err := h.Check(); err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

// Every string of a header goes through the same two checks, wherever it stands.
func TestCheckRefusesStringsThatCannotBeWritten(t *testing.T) {
	for place, header := range map[string]func(s string) smtpapi.Header{
		"to[0]":             func(s string) smtpapi.Header { return smtpapi.Header{To: []string{"@" + s}} },
		`sub "-a-"[0]`:      func(s string) smtpapi.Header { return smtpapi.Header{Sub: map[string][]string{"-a-": {s + "-"}}} },
		"sub: tag":          func(s string) smtpapi.Header { return smtpapi.Header{Sub: map[string][]string{s + "-": {"a"}}} },
		`section ":a"`:      func(s string) smtpapi.Header { return smtpapi.Header{Section: map[string]string{":a": s + "-"}} },
		"section: tag":      func(s string) smtpapi.Header { return smtpapi.Header{Section: map[string]string{s + "-": "a"}} },
		`unique_args "a"`:   func(s string) smtpapi.Header { return smtpapi.Header{UniqueArgs: map[string]string{"a": s + "-"}} },
		"unique_args: name": func(s string) smtpapi.Header { return smtpapi.Header{UniqueArgs: map[string]string{s + "-": "a"}} },
		"batch_id":          func(s string) smtpapi.Header { return smtpapi.Header{BatchID: s + "-"} },
		"ip_pool":           func(s string) smtpapi.Header { return smtpapi.Header{IPPool: s + "-"} },
		"category[0]":       func(s string) smtpapi.Header { return smtpapi.Header{Category: []string{s + "-"}} },
		`filters "opentrack"`: func(s string) smtpapi.Header {
			return with(smtpapi.Filters{OpenTrack: &smtpapi.OpenTrack{Replace: s + "-"}})
		},
		"filters: name": func(s string) smtpapi.Header {
			return with(smtpapi.Filters{Other: map[string]map[string]any{s + "-": nil}})
		},
		`filters "new": setting`: func(s string) smtpapi.Header {
			return with(smtpapi.Filters{Other: map[string]map[string]any{"new": {s + "-": 1}}})
		},
		`filters "new": "a"`: func(s string) smtpapi.Header {
			return with(smtpapi.Filters{Other: map[string]map[string]any{"new": {"a": s + "-"}}})
		},
		`filters "dkim"`: func(s string) smtpapi.Header { return with(smtpapi.Filters{DKIM: &smtpapi.DKIM{Domain: s + "-"}}) },
		`filters "templates"`: func(s string) smtpapi.Header {
			return with(smtpapi.Filters{Templates: &smtpapi.Templates{TemplateID: s + "-"}})
		},
		`filters "ganalytics"`: func(s string) smtpapi.Header {
			return with(smtpapi.Filters{GAnalytics: &smtpapi.GAnalytics{Source: s + "-"}})
		},
		`filters "footer": "text`: func(s string) smtpapi.Header { return with(smtpapi.Filters{Footer: &smtpapi.Footer{HTML: s + "-"}}) },
	} {
		t.Run(place, func(t *testing.T) {
			for name, s := range map[string]string{"longer than 996": strings.Repeat("x", 994), "not valid UTF-8": "\xff"} {
				err := header(s).Check()
				if strings.HasPrefix(place, "category") && s == "\xff" {
					name = "not US-ASCII"
				}
				if err == nil || !strings.Contains(err.Error(), place) || !strings.Contains(err.Error(), name) {
					t.Errorf("%s: got %v", name, err)
				}
			}
			if err := header(strings.Repeat("x", 993)).Check(); err != nil && !strings.HasPrefix(place, "section") {
				t.Errorf("996 octets: %v", err)
			}
		})
	}
}

func with(f smtpapi.Filters) smtpapi.Header { return smtpapi.Header{Filters: f} }

func TestCheckCountsEscapesOfAString(t *testing.T) {
	// 165 times six octets and two quotes are 992; two surrogates are twelve more.
	long := strings.Repeat("é", 165)
	if err := (smtpapi.Header{IPPool: long + "xxxx"}).Check(); err != nil {
		t.Error(err)
	}
	if err := (smtpapi.Header{IPPool: strings.Repeat("\x01", 165)}).Check(); err != nil {
		t.Error(err)
	}
	if err := (smtpapi.Header{IPPool: strings.Repeat("\x01", 166)}).Check(); err == nil {
		t.Error("166 control characters: no error")
	}
	for _, more := range []string{"xxxxx", "é", "😀", "\n\n\n", `"""`} {
		if err := (smtpapi.Header{IPPool: long + more}).Check(); err == nil {
			t.Errorf("%q: no error", more)
		}
	}
}

func TestCheckReportsAllMistakesAtOnce(t *testing.T) {
	check(t, smtpapi.Header{
		To:         []string{"ann@x.example", "bob", "", "dave"},
		Sub:        map[string][]string{"-n-": {"a"}},
		Category:   []string{"é"},
		ASMGroupID: -1,
	}, `smtpapi: to[1]: an address without @ (and 1 more)
smtpapi: to[2]: empty
smtpapi: sub "-n-" has 1 values and to 4: want one for each recipient
smtpapi: category[0]: not US-ASCII
smtpapi: asm_group_id: -1 is negative`)
}

// One recipient's tags are nested, or many's: which they are is asked of each of them alone.
func TestNestingIsThatOfOneRecipient(t *testing.T) {
	h := smtpapi.Header{Sub: map[string][]string{"-a-": {"-b-", "x"}, "-b-": {"x", "-a-"}}}
	if err := h.Check(); err != nil {
		t.Error(err)
	}
}
