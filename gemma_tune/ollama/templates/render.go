// Renders an Ollama TEMPLATE with Go's own text/template: a question as JSON on standard input, the texts as JSON on
// standard output. go_template.py prepares the question.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
	"time"
)

type message struct {
	Role, Content, Thinking, ToolName, ToolCallID string

	ToolCalls []struct {
		ID       string
		Function struct {
			Index     int
			Name      string
			Arguments object
		}
	}
}

// What Ollama keeps of a tool's declaration, in the order in which it writes it; all else is lost.
type tool struct {
	Type     string `json:"type"`
	Items    any    `json:"items,omitempty"`
	Function struct {
		Name        string `json:"name"`
		Description string `json:"description"`
		Parameters  struct {
			Type       string              `json:"type"`
			Defs       any                 `json:"$defs,omitempty"`
			Items      any                 `json:"items,omitempty"`
			Required   []string            `json:"required,omitempty"`
			Properties map[string]property `json:"properties"`
		} `json:"parameters"`
	} `json:"function"`
}

type property struct {
	AnyOf       []property          `json:"anyOf,omitempty"`
	Type        kinds               `json:"type,omitempty"`
	Items       any                 `json:"items,omitempty"`
	Description string              `json:"description,omitempty"`
	Enum        []any               `json:"enum,omitempty"`
	Properties  map[string]property `json:"properties,omitempty"`
}

// One type is a text, several are a list.
type kinds []string

func (all *kinds) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*all = kinds{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(all))
}

func (all kinds) MarshalJSON() ([]byte, error) {
	if len(all) == 1 {
		return json.Marshal(all[0])
	}
	return json.Marshal([]string(all))
}

// Values that print themselves as JSON.
type object map[string]any

type tools []tool

func (value object) String() string { return toJSON(value) }
func (value tools) String() string  { return toJSON(value) }

// A conversation is one rendering, or, where the template is of the older kind, one for each exchange. Values of the
// last exchange are rendered up to the place of the answer.
type question struct {
	Template      string
	Conversations [][]struct {
		System, Prompt, Response string
		Messages                 []*message
		Tools                    tools
		Think, IsThinkSet        bool
		ThinkLevel               string
		Cut                      bool
	}
}

func main() {
	var asked question
	check(json.NewDecoder(os.Stdin).Decode(&asked))
	whole, cut := parsed(asked.Template), parsed(asked.Template)
	cutAtResponse(cut.Root)
	texts := []string{}
	for _, conversation := range asked.Conversations {
		var text strings.Builder
		for _, values := range conversation {
			use := whole
			if values.Cut {
				use = cut
			}
			check(use.Execute(&text, map[string]any{
				"System": values.System, "Prompt": values.Prompt, "Response": values.Response,
				"Messages": values.Messages, "Tools": values.Tools, "Think": values.Think, "ThinkLevel": values.ThinkLevel,
				"IsThinkSet": values.IsThinkSet,
			}))
		}
		texts = append(texts, text.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}

var functions = template.FuncMap{
	"json":        toJSON,
	"currentDate": func(...string) string { return time.Now().Format("2006-01-02") },
}

func toJSON(value any) string {
	text, _ := json.Marshal(value)
	return string(text)
}

func parsed(source string) *template.Template {
	result, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(source)
	check(err)
	return result
}

// cutAtResponse leaves out the first node that prints .Response and all that follows it; true if there was one.
func cutAtResponse(list *parse.ListNode) bool {
	if list == nil {
		return false
	}
	for n, node := range list.Nodes {
		found, kept := false, n+1
		switch node := node.(type) {
		case *parse.ActionNode:
			found, kept = strings.Contains(node.String(), ".Response"), n
		case *parse.IfNode:
			found = cutAtResponse(node.List) || cutAtResponse(node.ElseList)
		case *parse.WithNode:
			found = cutAtResponse(node.List) || cutAtResponse(node.ElseList)
		case *parse.RangeNode:
			found = cutAtResponse(node.List) || cutAtResponse(node.ElseList)
		}
		if found {
			list.Nodes = list.Nodes[:kept]
			return true
		}
	}
	return false
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
